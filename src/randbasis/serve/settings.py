"""How a server is started, as plain values: the command takes its defaults from here, so nothing heavy is imported."""

from dataclasses import dataclass
from pathlib import Path

from randbasis.errors import SettingError

KEYS_FILE = "keys.json"
"""The file of keys, where none is named."""
READ, ADMIN = ROLES = ("read", "admin")
"""What a key may do: ask; and load and unload adapters, too."""


@dataclass(frozen=True)
class ServeSettings:
    """One server.

    Args:
        model: folder or hub name of the base.
        store: file of the store of adapters; None for those alone that an admin loads.
        name: what clients call the base; None takes the last part of ``model``.
        host: address to listen on.
        port: to listen on; 0 takes a free one.
        keys: file of keys; see :class:`randbasis.serve.keys.KeyRing`.
        adapter_folder: below which ``lora_path`` of an admin may name files; None for entries of the store alone.
        dtype: of the base.
        device: ``"auto"``, or one of torch.
        threads: threads of torch; None leaves them.
        max_batch_tokens: most tokens of one pass through the model.
        cache_tokens: tokens of all running requests together, whose keys and values are kept; None takes what an
            accelerator has room for, and on a CPU :data:`CACHE_TOKENS`.
        queue: most answers that are waited for; more are refused.
        row_bytes: that the coefficients and heads of resident adapters may take.
        expanded_bytes: that factors of adapters in use may take.
        max_body: most bytes of a request's body.
        drain_seconds: how long running requests may take to end, once the server is told to.
    """

    model: str
    store: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys: str = KEYS_FILE
    adapter_folder: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    max_batch_tokens: int = 512
    cache_tokens: int | None = None
    queue: int = 256
    row_bytes: int = 1 << 30
    expanded_bytes: int = 1 << 28
    max_body: int = 1 << 20
    drain_seconds: float = 30.0

    def check(self) -> None:
        """Refuse what cannot be used.

        Raises:
            SettingError: a value is out of range; the message names it.
        """
        least = {"max_batch_tokens": 8, "queue": 1, "row_bytes": 1, "expanded_bytes": 0, "max_body": 1, "threads": 1}
        for name, bound in {**least, "cache_tokens": 64}.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise SettingError(f"{name} must be at least {bound}, got {value}")
        if not 0 <= self.port < 1 << 16:
            raise SettingError(f"port must be from 0 to {(1 << 16) - 1}, got {self.port}")
        if not 0 <= self.drain_seconds < 1e6:
            raise SettingError(f"drain_seconds must be from 0 to a million, got {self.drain_seconds}")
        if self.adapter_folder is not None and not Path(self.adapter_folder).is_dir():
            raise SettingError(f"adapter_folder must be a folder, got {self.adapter_folder!r}")

    @property
    def base(self) -> str:
        """What clients call the base."""
        return self.name or Path(self.model).resolve().name


CACHE_TOKENS = 16384
"""On a CPU, where nothing tells how much room there is."""
