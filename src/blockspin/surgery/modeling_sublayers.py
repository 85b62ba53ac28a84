# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""A causal language model without some of its sub-layers. Loads with trust_remote_code; needs nothing but transformers.

Written by blockspin. config.json says which modules are gone (`absent_modules`: name -> length of the tuple that the
module returned, 0 for a bare tensor) and at which position of the cache each attention that is left keeps its keys and
values (`cache_positions`). Everything else is the stock model.
"""

import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig as OriginalConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM as OriginalModel


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


class ShortenedConfig(OriginalConfig):
    """The stock configuration under a name of its own, so that nothing takes the model for a whole one."""

    model_type = "llama_without_sublayers"

    def __init__(self, block_configs=None, **settings):
        super().__init__(**settings)
        if block_configs is not None:
            self.block_configs = [
                Settings(attention=Settings(block["attention"]), ffn=Settings(block["ffn"])) for block in block_configs
            ]


class ShortenedForCausalLM(OriginalModel):
    """The stock model; what is gone goes after it was made, so that no weight of it is asked for."""

    config_class = ShortenedConfig

    def __init__(self, config):
        super().__init__(config)
        for name, outputs in config.absent_modules.items():
            self.set_submodule(name, Absent(outputs))
        for name, position in config.cache_positions.items():
            self.get_submodule(name).layer_idx = position
