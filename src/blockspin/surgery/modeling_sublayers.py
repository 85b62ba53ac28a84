# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""A causal language model without some of its sub-layers. Loads with trust_remote_code; needs nothing but transformers.

Written by blockspin, the same for every model. config.json names the class: ShortenedLlamaForCausalLM is the stock
LlamaForCausalLM without some modules. It says which are gone (`absent_modules`: name -> length of the tuple that the
module returned, 0 for a bare tensor) and at which position of the cache each attention that is left keeps its keys and
values (`cache_positions`). Everything else is the stock model.
"""

import functools

import torch
import transformers
from torch import nn

# The names by which vLLM and llama.cpp know a Llama without some sub-layers.
DECILM = {"DeciLMConfig": "LlamaConfig", "DeciLMForCausalLM": "LlamaForCausalLM"}


class Absent(nn.Module):
    """Stands in for a module that is gone; holds nothing, and adds nothing to the residual stream."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, hidden_states, *args, **kwargs):
        nothing = torch.zeros_like(hidden_states)
        return (nothing, *[None] * (self.outputs - 1)) if self.outputs else nothing


class Settings(dict):
    """A table whose entries are attributes too, as some runtimes read them."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


class WithoutSublayersConfig:
    """The stock configuration under a name of its own, so that nothing takes the model for a whole one."""

    def __init__(self, block_configs=None, **settings):
        super().__init__(**settings)
        if block_configs is not None:
            self.block_configs = [
                Settings(attention=Settings(block["attention"]), ffn=Settings(block["ffn"])) for block in block_configs
            ]


class WithoutSublayers:
    """The stock model; what is gone goes after it was made, so that no weight of it is asked for."""

    def __init__(self, config):
        super().__init__(config)
        for name, outputs in config.absent_modules.items():
            self.set_submodule(name, Absent(outputs))
        for name, position in config.cache_positions.items():
            self.get_submodule(name).layer_idx = position


@functools.cache
def __getattr__(name):
    """The class of a name in config.json, for which transformers asks this module: made of the stock class it tells."""
    decilm = name in DECILM
    if not decilm and not name.startswith("Shortened"):
        raise AttributeError(name)
    stock = getattr(transformers, DECILM[name] if decilm else name.removeprefix("Shortened"))

    if issubclass(stock, transformers.PreTrainedConfig):
        own = {"model_type": "nemotron-nas" if decilm else f"{stock.model_type}_without_sublayers"}
        base = WithoutSublayersConfig
    else:
        own = {"config_class": __getattr__("DeciLMConfig" if decilm else f"Shortened{stock.config_class.__name__}")}
        base = WithoutSublayers
    return type(name, (base, stock), {"__module__": __name__, "__init__": base.__init__, **own})
