"""A layer takes another's place in a model, and what the model knew of the old one is kept true."""

from torch import nn

CALLS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CALLS += ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
CALLS += ("_forward_hooks_always_called",)


def replace_layers(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put ``new[old]`` wherever ``old`` is a child, in place."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # unlike named_children(), every name of it
            if child in new:
                parent._modules[name] = new[child]
                if isinstance(parent, nn.TransformerEncoderLayer):
                    _have_called(new[child])
    for part in model.modules():
        _tell_untied(part)


def _tell_untied(model: nn.Module) -> None:
    """Have a transformer's config say that its head no longer is the embedding.

    Else the library would tie them again when it resizes the vocabulary, and save one of them.
    """
    config = getattr(model, "config", None)
    if not (hasattr(config, "get_text_config") and hasattr(model, "get_output_embeddings")):
        return
    if model.get_output_embeddings() is None:
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(head, "weight", None) is not embedding.weight:
        for part in (config, config.get_text_config()):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False


def _have_called(layer: nn.Module) -> None:
    """Make torch's transformer call ``layer``: one hook inside keeps it from its fast path.

    That path, taken in eval mode, reads the weights of plain linear layers and calls none.
    """
    if not isinstance(layer, nn.Linear) and _nothing not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, args: tuple) -> None:
    """A hook whose presence is all it is for."""


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the hooks that are called around a forward or backward pass of ``old``."""
    for handle, hook in list(old._forward_pre_hooks.items()):
        if hook is _nothing:
            del old._forward_pre_hooks[handle]
    for name in CALLS:
        hooks = getattr(old, name)
        if hooks and getattr(new, name):
            getattr(new, name).update(hooks)
        elif hooks:  # the dictionary itself, through which their handles remove them
            setattr(new, name, hooks)
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook


def check_replaceable(name: str, layer: nn.Module) -> None:
    """Raise if something was put on the layer that another one can't take over."""
    if "forward" in vars(layer):
        words = "has a forward that was put on it from outside, as accelerate's hooks do"
        raise ValueError(f"{name} {words}: remove it first (remove_hook_from_module)")
    for key, hooks in vars(layer).items():
        if "state_dict" in key and "hook" in key and hooks:
            words = "which may rely on a weight that is a matrix: remove it, or name it in skip"
            raise ValueError(f"{name} has a state-dict hook ({key.strip('_')}), {words}")
