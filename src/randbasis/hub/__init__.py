"""ADAPTER FOLDER → HUB: what others need to use an adapter, with a model card that is filled in.

    push_to_hub("runs/e2e", "me/e2e-nola", base_name="acme/base", license="apache-2.0")

:func:`build_hub_folder` makes the same folder without sending it.
"""

from randbasis.hub.card import CardFacts, model_card
from randbasis.hub.push import HubFolder, Pushed, build_hub_folder, has_own_card, push_to_hub

__all__ = ["CardFacts", "HubFolder", "Pushed", "build_hub_folder", "has_own_card", "model_card", "push_to_hub"]
