"""A member of PEFT's own ``PeftType`` for all methods of this package.

PEFT and transformers read ``peft_type.value``, compare members by identity and list the members: a real member works
everywhere, a bare string does not. One type for all methods lets adapters of different methods live in one model.
"""

from peft.utils.peft_types import PeftType

from randbasis.errors import RegistrationError

TYPE_NAME = "RANDBASIS"
PREFIX = "randbasis_"
"""Start of the name of everything that an adapter adds to a layer."""


def add_peft_type(name: str) -> PeftType:
    """Add a member to ``PeftType``, or return the one that is there.

    Python closes an enumeration after its class body, so this does by hand what its metaclass does for a member.

    Raises:
        RegistrationError: the member could not be looked up afterwards.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # pyright: ignore[reportAttributeAccessIssue]
    member._sort_order_ = len(PeftType._member_names_)  # pyright: ignore[reportAttributeAccessIssue]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # From Python 3.12 members are looked up as class attributes.
    type.__setattr__(PeftType, name, member)
    if PeftType(name) is not member or getattr(PeftType, name) is not member or member not in list(PeftType):
        raise RegistrationError(
            f"PeftType has no working member {name!r} after adding it: this version of Python keeps enumerations "
            "differently; use a Python and PEFT version that randbasis was tested with"
        )
    return member


PEFT_TYPE = add_peft_type(TYPE_NAME)
