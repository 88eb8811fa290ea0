"""What the library transformers makes of the text of a config.json: a config, and a class built.

Invariant: nothing but the library's own code runs, and no network is asked: no code of a hub, no
pickle, no kernel that a config names. Imports torch only to build.
"""

import importlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

# What a config may say of the machine, or of code and kernels elsewhere.
_UNREAD = {"auto_map", "dtype", "torch_dtype", "quantization_config", "attn_implementation"}
_UNREAD |= {"experts_implementation", "use_kernels", "kernel_config"}  # and all that begin with _


def transformers() -> Any:
    os.environ["USE_HUB_KERNELS"] = "NO"  # read when the library is imported
    try:
        library = importlib.import_module("transformers")
        with suppress(ImportError):  # it may have been imported before, in a notebook
            kernels = importlib.import_module("transformers.integrations.hub_kernels")
            kernels._kernels_enabled = False  # type: ignore[attr-defined]
        return library
    except ImportError:
        problem = "needs the package transformers, which is not installed"
        raise ValueError(f"{problem}; pip install 'forescale[transformers]'") from None


def has_encoder(config: str) -> bool:
    """Return True if a config.json's text is of an encoder and a decoder."""
    return bool(json.loads(config).get("is_encoder_decoder", False))


def auto_class(config: str, masked: bool) -> str:
    """Return the name of the library's class that chooses the class of a config.json's text."""
    if has_encoder(config):
        return "AutoModelForSeq2SeqLM"
    return "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"


_MAPPINGS = {
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
}


def sees_both_sides(values: dict[str, Any]) -> bool:
    """Return True if the class of a config.json's content reads a text in both directions, and
    writes none."""
    library, kind = transformers(), values.get("model_type")
    if has_encoder(json.dumps(values)) or kind not in library.CONFIG_MAPPING:
        return False
    has_mask = library.CONFIG_MAPPING[kind] in library.MODEL_FOR_MASKED_LM_MAPPING
    return has_mask and not values.get("is_decoder", False)


def class_name(config: str, masked: bool) -> str:
    """Return the name of the class of a config.json's text."""
    library, known = transformers(), config_of(json.loads(config), masked)
    mapping = getattr(library, _MAPPINGS[auto_class(config, masked)])
    name: str = mapping[type(known)].__name__
    return name


def _readable(values: Any) -> Any:
    """Return the values of a config without those that name code, kernels or number formats."""
    if isinstance(values, list):
        return [_readable(value) for value in values]
    if not isinstance(values, dict):
        return values
    unread = lambda key: key in _UNREAD or key.startswith("_")  # noqa: E731
    return {key: _readable(value) for key, value in values.items() if not unread(key)}


def config_of(values: dict[str, Any], masked: bool, has_source: bool = True) -> Any:
    """Return the library's config object. has_source: rows are a source and a target. Raises
    ValueError if it knows no such class, or one that doesn't read such rows."""
    library, kind = transformers(), values.get("model_type")
    if kind not in library.CONFIG_MAPPING:
        problem = f"has model_type {kind!r}, which transformers {library.__version__} doesn't know"
        if "auto_map" in values:
            problem += ", and code that comes with a model is never run"
        raise ValueError(f"{problem}; name another model")
    try:
        config = library.CONFIG_MAPPING[kind].from_dict(_readable(values))
    except Exception as e:
        raise ValueError(_refusal(e)) from e
    if getattr(config, "is_encoder_decoder", False):
        if type(config) not in library.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            raise ValueError(f"{kind} reads or writes no text; name another model")
        if not has_source:
            problem = f"{kind} has an encoder and a decoder, which need a source and a target"
            todo = "train model=transformers model.name=DIR with objective=seq2seq, prefix or pairs"
            raise ValueError(f"{problem}; {todo}")
        return config
    causal = type(config) in library.MODEL_FOR_CAUSAL_LM_MAPPING
    both = type(config) in library.MODEL_FOR_MASKED_LM_MAPPING
    if masked and not both:
        raise ValueError(f"{kind} has no class for masked tokens; leave objective=masked out")
    if not masked and (not causal or (both and not getattr(config, "is_decoder", False))):
        doing = "sees later tokens" if both else "continues no text"
        raise ValueError(f"{kind} {doing}; write objective=masked, or name another model")
    return config


def build(name: str, config: Any, folder: str | None) -> Any:
    """Return the module that the class of this name makes (auto_class), with the weights in
    `folder`, else with random ones. Raises ValueError, "problem; what to do"."""
    import torch

    auto = getattr(transformers(), name)
    if folder is not None and not Path(folder).is_dir():
        problem = "is not there, and the run begins with its weights"
        raise ValueError(f"{problem}; copy the directory to this machine")
    if folder is None:
        try:
            return auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except (ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError) as e:
            raise ValueError(_refusal(e)) from e
    options: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)
    options |= dict(config=config, dtype=torch.float32, use_safetensors=True)
    try:
        module, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as e:
        if "ignore_mismatched_sizes" in str(e):
            problem = "its config.json gives other shapes than its weights have"
            raise ValueError(f"{problem}; correct its config.json") from e
        raise ValueError(_refusal(e)) from e
    if missing := sorted(info["missing_keys"]):
        problem = f"its files lack {len(missing):,} weights of the class, such as {missing[0]}"
        raise ValueError(f"{problem}; download it again")
    if beyond := [name for name in sorted(info["unexpected_keys"]) if _is_layer_of(module, name)]:
        problem = f"its config.json has fewer layers than its files, which hold {beyond[0]}"
        raise ValueError(f"{problem}; correct its config.json")
    return module


def _is_layer_of(module: Any, name: str) -> bool:
    """Return True if a weight of this name would be in a list of layers that the module has, behind
    its last one."""
    words = name.split(".")
    for i in (i for i, word in enumerate(words) if word.isdecimal()):
        with suppress(AttributeError):
            layers = module.get_submodule(".".join(words[:i]))
            if type(layers).__name__ == "ModuleList" and len(layers) <= int(words[i]):
                return True
    return False


def _refusal(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")[:200].rstrip(".").replace(";", ",")
    return f"transformers can't build it ({type(error).__name__}: {line}); correct its config.json"
