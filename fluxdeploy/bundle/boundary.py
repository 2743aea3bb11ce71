"""The tensors that a host gives to each component, and takes from it.

A manifest that names others, or in which a size is not the same on both sides, is refused when it
is read: a host would fail with it in the middle of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fluxdeploy.bundle.side_paths import find_side_paths, is_side_input
from fluxdeploy.bundle.typed_json import FieldError

__all__ = ["NEEDED", "REDUX", "RESIDUALS", "SEEN", "Tensors", "check_boundary"]

Shape = tuple[int | str, ...]

Tensors = Mapping[str, tuple[str, Shape]]
"""For each tensor, its dtype and its shape."""

NEEDED = ("clip", "t5", "conditioner", "transformer", "vae_decoder")
"""The components that every picture takes."""

REDUX = "redux"
"""The component that makes text embeddings of pictures."""

RESIDUALS = ("double_residuals", "single_residuals")
"""What ControlNets give and the transformer takes; a network without such blocks has not both."""

SEEN = ("ip_keys", "ip_values")
"""What an IP-Adapter makes of a picture and the transformer attends to, of all double blocks."""

_OPTIONAL = (*RESIDUALS, *SEEN, "mode", "control_mode")
"""Tensors that a component may have or lack."""

_INTEGERS = (".input_ids", ".control_mode")

_HAVE_SIDE_PATHS = ("conditioner", "transformer")

_PICTURE: Shape = ("B", 3, "H", "W")
_SEEN, _GIVEN = (
    dict.fromkeys(SEEN, ("the blocks that see", "B", tokens, "the transformer's width"))
    for tokens in ("V", "the tokens of a picture that is seen")
)

# A word is a size that is the same wherever it stands; a letter is a symbol of the manifest.
_BOUNDARY: Mapping[str, tuple[Mapping[str, Shape], Mapping[str, Shape]]] = {
    "clip": (
        {"input_ids": ("B", "CLIP's tokens")},
        {"pooled_embeddings": ("B", "CLIP's width")},
    ),
    "t5": ({"input_ids": ("B", "S")}, {"text_embeddings": ("B", "S", "T5's width")}),
    "conditioner": (
        {
            "text_embeddings": ("B", "S", "T5's width"),
            "pooled_embeddings": ("B", "CLIP's width"),
            "timestep": ("N",),
            "guidance": ("B",),
        },
        {
            "context": ("B", "S", "the transformer's width"),
            "modulation": ("N", "B", "the modulation's rows", "the transformer's width"),
        },
    ),
    "transformer": (
        {
            "hidden_states": ("B", "L", "what a task reads"),
            "context": ("B", "S", "the transformer's width"),
            "modulation": ("B", "the modulation's rows", "the transformer's width"),
            "rope_cos": ("T", "a head's channels"),
            "rope_sin": ("T", "a head's channels"),
            "double_residuals": ("double residuals", "B", "L", "the transformer's width"),
            "single_residuals": ("single residuals", "B", "L", "the transformer's width"),
            **_SEEN,
        },
        {"velocity": ("B", "L", "a token's channels")},
    ),
    "vae_decoder": ({"latents": ("B", "the latents' channels", "h", "w")}, {"images": _PICTURE}),
    "vae_encoder": (
        {"images": _PICTURE},
        {
            "mean": ("B", "the latents' channels", "h", "w"),
            "logvar": ("B", "the latents' channels", "h", "w"),
        },
    ),
}


# Not known to the C++ library, which draws without one.
_JOINED: Mapping[str, tuple[Mapping[str, Shape], Mapping[str, Shape]]] = {
    "ip_adapter_encoder": (
        {"pixel_values": ("B", 3, "the rows of what is seen", "the columns of what is seen")},
        {"image_embeds": ("B", "the picture's embedding")},
    ),
    "ip_adapter": ({"image_embeds": ("B", "the picture's embedding")}, _GIVEN),
    REDUX: (
        {"pixel_values": ("B", 3, "the rows of its pixels", "the columns of its pixels")},
        {"image_embeddings": ("B", "a picture's tokens", "T5's width")},
    ),
}


def _controlnet(name: str) -> Mapping[str, tuple[Mapping[str, Shape], Mapping[str, Shape]]]:
    """The boundaries of a ControlNet's components."""
    width, rows = "the transformer's width", f"the rows of {name}"
    tables: Mapping[str, Shape] = {
        "rope_cos": ("T", "a head's channels"),
        "rope_sin": ("T", "a head's channels"),
    }
    residuals: Mapping[str, Shape] = {
        each: (f"{each} of {name}", "B", "L", width) for each in RESIDUALS
    }
    tokens: Shape = ("B", "L", "a token's channels")
    return {
        f"{name}_encoder": ({"images": _PICTURE}, {"control_latents": tokens}),
        f"{name}_conditioner": (
            {**_BOUNDARY["conditioner"][0], "control_mode": ("B", 1)},
            {
                "context": ("B", "S", width),
                "modulation": ("N", "B", rows, width),
                "mode": ("B", 1, width),
            },
        ),
        name: (
            {
                "hidden_states": tokens,
                "control_latents": tokens,
                "context": ("B", "S", width),
                "modulation": ("B", rows, width),
                **tables,
                "mode": ("B", 1, width),
            },
            residuals,
        ),
    }


def check_boundary(
    components: Mapping[str, tuple[Tensors, Tensors]],
    guidance: bool,
    controlnets: Sequence[str],
    sizes: Mapping[str, tuple[int, str]],
) -> None:
    """Hold the inputs and outputs of the components that hosts know against what they expect.

    guidance: whether the conditioner takes a guidance scale. controlnets: the components that are
    ControlNets; their conditioners may take one or not. sizes: what the rest of the manifest
    says of a size, and where. Raises `FieldError` with the place in the manifest.
    """
    known = dict(sizes)
    boundary = {**_BOUNDARY, **_JOINED}
    for controlnet in controlnets:
        boundary |= _controlnet(controlnet)
    for name, expected in boundary.items():
        if name not in components:
            continue
        for side, tensors, wanted in zip(
            ("inputs", "outputs"), components[name], expected, strict=True
        ):
            where = f"components.{name}.{side}"
            if side == "inputs" and name in _HAVE_SIDE_PATHS:
                tensors = _without_side_paths(where, tensors)
            optional = _OPTIONAL if name in _BOUNDARY else (*_OPTIONAL, "guidance")
            names = [each for each in wanted if each in tensors or each not in optional]
            if not guidance and name in _BOUNDARY and "guidance" in names:
                names.remove("guidance")
            if set(tensors) != set(names):
                raise FieldError(
                    where, f"must be {', '.join(names)}, not {', '.join(tensors) or 'none'}"
                )
            for tensor in names:
                _check_tensor(f"{where}.{tensor}", *tensors[tensor], wanted[tensor], known)


def _without_side_paths(where: str, tensors: Tensors) -> Tensors:
    """A component's inputs but for those of low-rank side paths, which are checked here."""
    try:
        find_side_paths({name: shape for name, (_, shape) in tensors.items()})
    except ValueError as error:
        raise FieldError(where, f"cannot be run: {error}") from error
    for name, (dtype, _) in tensors.items():
        if is_side_input(name) and dtype != "float32":
            raise FieldError(f"{where}.{name}", f"is {dtype}; it must be float32")
    return {name: tensor for name, tensor in tensors.items() if not is_side_input(name)}


def _check_tensor(
    where: str, dtype: str, shape: Shape, wanted: Shape, known: dict[str, tuple[int, str]]
) -> None:
    kind = "int32" if where.endswith(_INTEGERS) else "float32"
    if dtype != kind:
        raise FieldError(where, f"is {dtype}; it must be {kind}")
    fits = len(shape) == len(wanted) and all(
        isinstance(size, int) if _is_word(expected) else size == expected
        for size, expected in zip(shape, wanted, strict=True)
    )
    if not fits:
        raise FieldError(where, f"has the shape {list(shape)}; it must be {list(wanted)}")
    for size, expected in zip(shape, wanted, strict=True):
        if isinstance(size, int) and isinstance(expected, str):
            other, place = known.setdefault(expected, (size, where))
            if size != other:
                raise FieldError(
                    where, f"gives {size} for {expected}, and {place} makes that {other}"
                )


def _is_word(expected: int | str) -> bool:
    return isinstance(expected, str) and len(expected) > 1
