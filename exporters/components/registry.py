"""The components of a bundle. A component joins by a line here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from exporters.components.component import Component, Networks
from exporters.components.controlnet import controlnet_components
from exporters.components.ip_adapter import IP_ADAPTER, IP_ADAPTER_ENCODER
from exporters.components.mmdit import CONDITIONER, ONE_PIECE, TRANSFORMER
from exporters.components.redux import REDUX_COMPONENT
from exporters.components.text_encoders import CLIP, T5
from exporters.components.vae import VAE_DECODER, VAE_ENCODER
from fluxdeploy.errors import UsageError

__all__ = [
    "COMPONENTS",
    "ONE_PIECE_COMPONENTS",
    "choose_precisions",
    "components_of",
    "find_component",
]


def _by_name(components: Iterable[Component]) -> Mapping[str, Component]:
    return {component.name: component for component in components}


COMPONENTS = _by_name((CLIP, T5, CONDITIONER, TRANSFORMER, VAE_DECODER, VAE_ENCODER))
"""Those of every checkpoint, in the order in which a picture passes them."""

ONE_PIECE_COMPONENTS = _by_name((CLIP, T5, ONE_PIECE, VAE_DECODER, VAE_ENCODER))
"""What other tools expect: one transformer, and no conditioner."""


def components_of(networks: Networks) -> Mapping[str, Component]:
    """Those of a checkpoint, with those of ControlNets and an IP-Adapter before the transformer,
    which takes what they give.

    A Redux's comes where text encoders do.
    """
    controlnets = [
        component
        for number in range(len(networks.controlnets))
        for component in controlnet_components(number)
    ]
    found = list(COMPONENTS.values())
    at = list(COMPONENTS).index("transformer")
    encoders = [] if networks.redux is None else [REDUX_COMPONENT]
    adapter = [] if networks.ip_adapter is None else [IP_ADAPTER_ENCODER, IP_ADAPTER]
    return _by_name([*encoders, *found[:at], *controlnets, *adapter, *found[at:]])


def find_component(name: str, components: Mapping[str, Component] = COMPONENTS) -> Component:
    """The component of a name. Raises `UsageError` for one that there is not."""
    if name not in components:
        raise UsageError(f"There is no component {name!r}; there are {', '.join(components)}.")
    return components[name]


def choose_precisions(
    components: Mapping[str, Component], precision: str, overrides: Mapping[str, str]
) -> dict[str, str]:
    """What each component is to be built in, where the transformer is to be in `precision`.

    Raises `UsageError` for an override of a component that there is not, and for a precision that a
    component is not built in.
    """
    for name in overrides:
        find_component(name, components)
    chosen = {}
    for name, component in components.items():
        chosen[name] = overrides.get(name, component.precision_beside(precision))
        component.check_precision(chosen[name])
    return chosen
