"""One class per broken rule, one base class.

Every message names the argument, the rule, the value got and the way out. Each class also derives from the builtin
that a caller would expect, so that ``except ValueError`` keeps working.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class RandbasisError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        told_elsewhere: whether another process of the same run is the one to tell it.
    """

    told_elsewhere: bool = False


class SeedError(RandbasisError, ValueError):
    """A seed is not an integer of 64 unsigned bits."""


class LawError(RandbasisError, ValueError):
    """A law of the basis is unknown or its parameter is out of range."""


class BasisShapeError(RandbasisError, ValueError):
    """A shape, a start or a stream does not fit the counters of the generator."""


class StorageError(RandbasisError, ValueError):
    """A kind of basis storage is unknown."""


class BackendError(RandbasisError, RuntimeError):
    """A named implementation of the ops does not exist or cannot run here."""


class UnknownMethodError(RandbasisError, ValueError):
    """A method name is not one of the registered methods."""


class RankError(RandbasisError, ValueError):
    """A rank or a number of basis matrices is not a positive integer, or is above what the method allows."""


class HyperparameterError(RandbasisError, ValueError):
    """A hyper-parameter of a method or of its configuration has a value that it cannot take."""


class TieError(HyperparameterError):
    """Matrices cannot share one coefficient vector: of this method or shape, or where it is not at hand."""


class ContractionError(RandbasisError, ValueError):
    """An order of contraction is unknown, or was forced where it cannot be used."""


class DifferentiationError(RandbasisError, RuntimeError):
    """A derivative of a backward pass that keeps no graph was asked for."""


class TargetError(RandbasisError, ValueError):
    """``target_modules`` matches nothing, or is written in a form that is not understood."""


class LayerTypeError(RandbasisError, TypeError, ValueError):
    """A target is a module that cannot be adapted (only linear layers can)."""


class BypassedLayerError(TargetError):
    """A target whose weight the model reads without calling it, or calls past the place where the adapter would be."""


class ShardedBaseError(RandbasisError, ValueError):
    """A target whose weight is spread over several devices, of which the adapter would see a part."""


class SliceError(RandbasisError, ValueError):
    """A slice of a fused projection does not exist or does not divide the projection."""


class AdapterNameError(RandbasisError, ValueError):
    """An adapter name is unknown, or cannot be used here."""


class CombinationError(RandbasisError, ValueError):
    """Adapters cannot be combined in the way asked for."""


class MergeError(RandbasisError, ValueError):
    """An adapter cannot be merged, or merging it would write values that are not finite."""


class AdapterFilesError(RandbasisError, ValueError):
    """An adapter directory is missing, incomplete, or was not written by this package."""


class AdapterMissingError(AdapterFilesError, FileNotFoundError):
    """There is no adapter where one was to be read."""


class PackedFileError(RandbasisError, ValueError):
    """A packed adapter file breaks a rule of its format; each rule has a class of its own below this one."""


class TruncatedFileError(PackedFileError):
    """A packed file is shorter or longer than its header says."""


class HeaderSizeError(PackedFileError):
    """The header of a packed file is longer than the limit or than the file."""


class HeaderError(PackedFileError):
    """The header of a packed file is not one of a safetensors file."""


class NotPackedError(PackedFileError):
    """A safetensors file is not a packed adapter of this package."""


class FormatVersionError(PackedFileError):
    """A packed file has a version of the format that this version of the package does not read."""


class SpecSyntaxError(PackedFileError):
    """The spec of a packed file is not a JSON object."""


class SpecKeyError(PackedFileError):
    """The spec of a packed file lacks a key, or has one that its version does not know."""


class SpecValueError(PackedFileError):
    """A value in the spec of a packed file is of another kind or range than its key promises."""


class UnsafeNameError(PackedFileError):
    """A name in a packed file is an absolute path, or climbs out of its directory."""


class ExtraTensorError(PackedFileError):
    """The tensors of a packed file are not the ones that its spec names."""


class CoefficientTensorError(PackedFileError):
    """A tensor of a packed file has another dtype or shape than its spec implies."""


class CodeError(PackedFileError):
    """Quantized coefficients hold a code, or a bit after the last code, that no writer writes."""


class DigestError(PackedFileError):
    """The content of a packed file is not what its digest was taken of."""


class PackedFileMissingError(RandbasisError, FileNotFoundError):
    """There is no packed file of that name."""


class AdapterTypeError(RandbasisError, TypeError):
    """An adapter was given as an object of another kind than the call takes."""


class PrecisionError(RandbasisError, ValueError):
    """Coefficients cannot be stored at the precision asked for."""


class BaseMismatchError(RandbasisError, ValueError):
    """An adapter was made for a base model of another shape."""


class BaseWeightError(RandbasisError, ValueError):
    """A method makes frozen matrices of the base model's weights, which are not at hand, or are no plain numbers."""


class MeaningError(RandbasisError, ValueError):
    """Coefficients were made for another seed, law or other option than those of the adapter that they are put on."""


class CoefficientCountError(RandbasisError, ValueError):
    """A tensor of coefficients has another number of entries than its method, rank and basis imply."""


class CoefficientValueError(RandbasisError, ValueError):
    """Coefficients contain a value that is not finite."""


class StreamValueError(RandbasisError, ValueError):
    """Stored streams were cast to floating point or averaged, and name other random matrices now."""


class SettingError(RandbasisError, ValueError):
    """A setting of a training run, or a combination of settings, cannot be used."""


class BudgetError(RandbasisError, ValueError):
    """A budget is no number of bytes, or less than any adapter has."""


class StudyError(RandbasisError, ValueError):
    """A study file says what it may not, or a comparison cannot be made as it says."""


class OptionError(RandbasisError, ValueError):
    """An option of the command was given where it would be ignored."""


class DataFormatError(RandbasisError, ValueError):
    """A data file is of an unknown kind, or its content is not what its kind promises."""


class DataMissingError(RandbasisError, FileNotFoundError):
    """A data file or folder does not exist."""


class PartialModelError(DataMissingError):
    """A checkpoint lacks weights of its model, has them in another shape, or has others that the model has not."""


class EmptyDataError(RandbasisError, ValueError):
    """A data file, a split or a column holds nothing to work on."""


class ColumnError(RandbasisError, ValueError):
    """A column does not exist in the data, or a row has no value in it."""


class LabelError(RandbasisError, ValueError):
    """A label was not seen in training, or is not of the kind that the task needs."""


class NonFiniteLossError(RandbasisError, ArithmeticError):
    """Training met a loss or a coefficient that is not finite."""


class OutputExistsError(RandbasisError, FileExistsError):
    """An output exists and would have to be replaced."""


class CheckpointError(RandbasisError, FileNotFoundError):
    """There is no usable checkpoint to resume from."""


class SaveError(RandbasisError, OSError):
    """A file could not be written, for example because the disk is full."""

    def __str__(self) -> str:
        """The message, which says what the number means."""
        return self.strerror or super().__str__()


class LocationError(RandbasisError, ValueError):
    """A URL has a scheme that nothing opens, lacks a part, or stands where only a path of this machine can."""


class LocationTypeError(LocationError, TypeError):
    """Neither a path nor a URL was given where a file or folder must be named."""


class RemoteError(RandbasisError, OSError):
    """What a URL names could not be reached, read or written."""


class MissingPackageError(RandbasisError, ImportError):
    """An optional dependency is needed for what was asked and is not installed."""


class BrokenPackageError(RandbasisError, ImportError):
    """An optional dependency is installed and cannot be imported."""


class RegistrationError(RandbasisError, RuntimeError):
    """The method could not be registered with PEFT."""


class VersionPairError(RegistrationError, ValueError):
    """The installed versions of transformers and PEFT cannot do together what was asked for."""


class StoreNameError(RandbasisError, ValueError):
    """A name or a tag is one that the store does not take."""


class StoreOptionError(RandbasisError, ValueError):
    """A number or a combination of arguments given to the store is out of range or contradicts itself."""


class StoreMissingError(RandbasisError, FileNotFoundError):
    """There is no store of that name."""


class StoreFormatError(RandbasisError, ValueError):
    """A file is not a store of this package."""


class StoreVersionError(RandbasisError, ValueError):
    """A store has a schema that this version of the package does not know."""


class StoreLockedError(RandbasisError, TimeoutError):
    """Another process kept the store locked for longer than the time to wait."""


class StoreAccessError(RandbasisError, PermissionError):
    """A store cannot be opened or written with the rights that there are."""


class StoreClosedError(RandbasisError, RuntimeError):
    """A store was used after it was closed."""


class StoreDamagedError(RandbasisError, RuntimeError):
    """What a store holds is not what was put into it."""


class NotStoredError(RandbasisError, LookupError, ValueError):
    """The store has no such adapter, version or digest."""


class BankError(RandbasisError, ValueError):
    """A bank, or an adapter in it, cannot be used in the way asked for."""


class BankFullError(BankError):
    """An adapter does not fit into a bank beside those that are pinned or in use."""


class NotResidentError(RandbasisError, LookupError, ValueError):
    """A bank has no adapter of that name."""


class ManifestError(RandbasisError, ValueError):
    """The folder of an export has no manifest, or one that does not fit its format or its files."""


class ImportConflictError(RandbasisError, ValueError):
    """An import would give a version that is there another content."""


class HubNameError(RandbasisError, ValueError):
    """A repository or a base model has a name that a hub does not take, or that only this machine knows."""


class HubError(RandbasisError, OSError):
    """A hub refused what was sent to it, or could not be reached."""


class ExportOptionError(RandbasisError, ValueError):
    """An export is unknown."""


class ExportRankError(RandbasisError, ValueError):
    """An adapter whose ΔW has full rank is to become a LoRA of no stated rank."""


class ExportBaseError(RandbasisError, ValueError):
    """An export needs the base model, and nobody names it."""


class ExportArchitectureError(RandbasisError, ValueError):
    """A format has no place for the layers of a base model of this architecture."""


class ExportHeadError(RandbasisError, ValueError):
    """A format has no place for what was trained whole beside an adapter."""


class UnsupportedAdapterError(RandbasisError, ValueError):
    """An adapter of PEFT does more, or other, than to add a ΔW to linear layers."""


class ProjectionsMissingError(RandbasisError, ValueError):
    """A VeRA or RandLoRA checkpoint of PEFT does not carry its random matrices."""


class ImportOptionError(RandbasisError, ValueError):
    """What an import is to become is unknown."""


class ResidualError(RandbasisError, ValueError):
    """What an adapter would become is further from it than the limit that was set."""


class BasisMismatchError(RandbasisError, ValueError):
    """Coefficients of adapters belong to different bases and cannot be added."""


class MatrixMismatchError(RandbasisError, ValueError):
    """Adapters that are to be averaged adapt different matrices."""


class HeadMismatchError(RandbasisError, ValueError):
    """What was trained whole beside adapters cannot be averaged."""


class WeightsError(RandbasisError, ValueError):
    """The weights of an average are not one finite number for each adapter."""


class KeysError(RandbasisError, ValueError):
    """A key of the server, or the file of keys, cannot be what it is said to be."""


class AnswerError(RandbasisError, ValueError):
    """What a client of the server asks for cannot be answered."""


class AdapterRefusedError(RandbasisError, ValueError):
    """An adapter that is there cannot be served on this base."""


class QueueFullError(RandbasisError, RuntimeError):
    """As many requests wait as the server takes."""


class EngineStoppedError(RandbasisError, RuntimeError):
    """The server answers no more: it is shutting down, or its loop ended with an error."""


def near(name: str, known: Iterable[str], limit: int = 5) -> str:
    """The names closest to ``name``, for the way out of an error message.

    Args:
        name: what was asked for.
        known: what there is.
        limit: how many names to give at most.

    Returns:
        ``"did you mean a, b?"`` or, when nothing is close, ``"there are: a, b, ..."``.
    """
    names = sorted(set(known))
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return nearest(name, names, limit) or (f"there are: {shown}" if names else "there are none")


def nearest(name: str, known: Iterable[str], limit: int = 5) -> str:
    """As :func:`near` where the message lists what there is by itself; empty when nothing is close."""
    close = get_close_matches(name, sorted(set(known)), n=limit, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else ""


def not_one_of(argument: str, value: str, known: Iterable[str]) -> str:
    """The message of an error on a value that is none of those that its argument can have."""
    names = [*known]
    hint = nearest(value, names)
    return f"{argument} must be one of {names}, got {value!r}" + (f"; {hint}" if hint else "")
