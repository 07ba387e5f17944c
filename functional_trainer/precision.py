"""Which products of a model are in 8 bits: decided here, by regexes over parameter paths."""

import re
from typing import Any

import kernels
from functional_trainer import param
from functional_trainer.options import Fp8Options
from functional_trainer.types import Fp8


def fp8(o: Fp8Options, model: Any) -> Fp8:
    """Return the recipe of every matrix that --fp8.exclude leaves, by the name that maths has for it.

    ValueError if the regex matches no parameter, only some layers', some of one product, or not all that is no matrix.
    """
    flat: dict[str, Any] = {}
    param.tree.map_with_path(flat.__setitem__, model.specs, is_leaf=param.is_param)
    out = {path: re.fullmatch(o.exclude, path) is not None for path in flat}
    names = {path: re.sub(r"(^|/)\d+(?=/)", r"\1_", path) for path in flat}
    said = f"--fp8.exclude {o.exclude!r}"
    if not any(out.values()):
        raise ValueError(f"{said} matches no parameter; paths are {', '.join(dict.fromkeys(names.values()))}")
    for path, name in names.items():
        if out[path] != (re.fullmatch(o.exclude, name) is not None):
            raise ValueError(f"{said} treats {path} unlike {name}; layers are alike: let it match any (\\w+, not \\d+)")
    if wrong := [path for path, p in flat.items() if not (out[path] or p.is_matrix)]:
        raise ValueError(f"{said} leaves {', '.join(dict.fromkeys(names[p] for p in wrong))}: no matrices of a layer")
    for group in model.together:
        own = [path for path, name in names.items() if name in {f"layers/_/{k}" for k in group}]
        if 0 < sum(out[path] for path in own) < len(own):
            raise ValueError(f"{said} matches some of {', '.join(group)}, which are one product: match all or none")
    return {f"params/{names[path]}": kernels.RECIPES[o.recipe] for path in flat if not out[path]}
