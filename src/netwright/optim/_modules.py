"""A model's children as parameter groups."""

from torch import nn

from netwright.core.errors import SettingError
from netwright.optim._base import Group

__all__ = ["module_groups"]


def module_groups(model: nn.Module, *first: str) -> list[Group]:
    """Parameter groups for :class:`AGVM`, one for each child module that has parameters.

    Args:
        model: whose direct children are the modules; parameters of its own make a last group.
        first: names of children to put first, the reference before all; the others follow in their order.

    Raises:
        SettingError: a name that is no child.

    Example:
        >>> model = nn.ModuleDict({"head": nn.Linear(2, 2), "backbone": nn.Linear(2, 2)})
        >>> [group["name"] for group in module_groups(model, "backbone")]
        ['backbone', 'head']
    """
    children = dict(model.named_children())
    unknown = [name for name in first if name not in children]
    if unknown:
        raise SettingError(f"module_groups: no child {', '.join(unknown)}; there are {', '.join(children) or 'none'}.")
    ordered = [*first, *(name for name in children if name not in first)]
    parts = [(name, list(children[name].parameters())) for name in ordered]
    parts.append(("", list(model.parameters(recurse=False))))
    seen: set[nn.Parameter] = set()
    groups: list[Group] = []
    for name, params in parts:
        own = [param for param in params if param not in seen]
        seen.update(own)
        if own:
            groups.append({"params": own, "name": name})
    return groups
