"""The distillation loss: against a few lines on the full logits, and when a student is sharded."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import VOCABULARY, tiny_model
from students import TWO_PROCESSES, losses_of, reference_kl, samples, shortened
from tiny import tiny_config, tiny_random_model
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from blockspin.distillation.divergence import divergence
from blockspin.distillation.loss import split
from blockspin.surgery.memory import remove_blocks


def pair(family: str = "llama") -> tuple[tf.PreTrainedModel, tf.PreTrainedModel]:
    return tiny_model(family, seed=1), tiny_model(family, seed=2)


def ragged() -> dict[str, torch.Tensor]:
    """Two rows, of 11 and 7 tokens."""
    token_ids = torch.randint(2, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(token_ids)
    mask[1, 7:] = 0
    return {"input_ids": token_ids, "attention_mask": mask}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradient_are_those_of_the_full_logits(family: str, temperature: float) -> None:
    (student, teacher), inputs = pair(family), ragged()
    found = losses_of(student, teacher, inputs, chunk_tokens=5, temperature=temperature)
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    logits, target = student(**inputs).logits, teacher(**inputs).logits.detach()
    kl = reference_kl(logits, target, temperature) * inputs["attention_mask"]
    torch.autograd.backward(kl.sum())
    torch.testing.assert_close(found["kl"], kl)
    for name, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-5)
    for row, length in enumerate([11, 7]):
        labels = inputs["input_ids"][row, 1:length]
        expected = cross_entropy(logits[row, : length - 1], labels, reduction="none")
        torch.testing.assert_close(found["cross_entropy"][row, : length - 1], expected)
        assert not found["cross_entropy"][row, length - 1 :].any()


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "cohere", "gemma3n_text", "mamba2", "opt", "bloom"])
def test_heads_that_scale_or_cap_their_logits_run_apart(model_type: str) -> None:
    model = tiny_random_model(tiny_config(model_type))
    inputs = {"input_ids": ragged()["input_ids"]}
    halves = split(model)
    assert halves.is_split
    with torch.no_grad():
        found = halves.logits(halves.hidden(**inputs).flatten(0, 1))
    torch.testing.assert_close(found, model(**inputs).logits.flatten(0, 1).detach())


class Centred(tf.LlamaForCausalLM):  # type: ignore[misc]
    """Its logits depend on the whole sequence, so its head cannot be run on some of the tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits - output.logits.mean(dim=1, keepdim=True)
        return output


def test_a_head_that_cannot_run_apart_is_run_whole(capsys: pytest.CaptureFixture[str]) -> None:
    (student, teacher), inputs = pair(), {"input_ids": ragged()["input_ids"]}
    student.__class__ = Centred
    found = losses_of(student, teacher, inputs, chunk_tokens=3)
    torch.testing.assert_close(found["kl"], reference_kl(student(**inputs).logits, teacher(**inputs).logits))
    assert "all its logits are held at once" in capsys.readouterr().err
    assert "forward" not in vars(student) | vars(student.model)


def test_only_the_most_probable_tokens_of_the_teacher_count() -> None:
    (student, teacher), inputs = pair(), {"input_ids": ragged()["input_ids"]}
    found = losses_of(student, teacher, inputs, top_k=4)["kl"].detach()
    ours, theirs = student(**inputs).logits.softmax(-1), teacher(**inputs).logits.softmax(-1)
    for row, place in [(0, 0), (1, 4), (0, 10)]:
        p, q = theirs[row, place].tolist(), ours[row, place].tolist()
        top = sorted(range(VOCABULARY), key=lambda token: -p[token])[:4]
        p, q = ([*(values[token] for token in top), 1 - sum(values[token] for token in top)] for values in (p, q))
        expected = sum(a * float(torch.log(torch.tensor(a / b))) for a, b in zip(p, q, strict=True))
        assert float(found[row, place]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_hidden_states_are_compared_after_the_kept_blocks() -> None:
    teacher, inputs = tiny_model("llama"), ragged()
    student = copy.deepcopy(remove_blocks(teacher, [1]))
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    found = losses_of(student, teacher, inputs, kept=[0, 2, 3])["hidden"].detach()
    captured: list[torch.Tensor] = []
    layers = [*(student.model.layers[i] for i in range(3)), *(teacher.model.layers[i] for i in (0, 2, 3))]
    handles = [layer.register_forward_hook(lambda m, a, output: captured.append(output)) for layer in layers]
    with torch.no_grad():
        student(**inputs)
        teacher(**inputs)
    for handle in handles:
        handle.remove()
    ours, theirs = torch.stack(captured[:3]), torch.stack(captured[3:])
    expected = (ours - theirs).norm(dim=-1) ** 2 / theirs.norm(dim=-1) ** 2
    torch.testing.assert_close(found, expected.mean(0) * inputs["attention_mask"])
    assert not expected[0].any()
    assert expected[2].all()


@pytest.mark.parametrize("kind", ["reverse-kl", "js"])
def test_other_divergences_are_their_formulas(kind: str) -> None:
    """Over distributions p and q in float64: sum q log(q / p), and the mean KL of both from (p + q) / 2."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64).softmax(-1)
    mean = (p + q) / 2
    expected = {
        "reverse-kl": (q * (q / p).log()).sum(-1),
        "js": ((p * (p / mean).log()).sum(-1) + (q * (q / mean).log()).sum(-1)) / 2,
    }
    torch.testing.assert_close(divergence(kind, p.log(), q.log()), expected[kind])


def test_another_divergence_is_beside_the_kl() -> None:
    student, teacher = shortened()
    inputs = {"input_ids": torch.stack(samples(3))}
    found = losses_of(student, teacher, inputs, kind="js", chunk_tokens=7)
    with torch.no_grad():
        ours, theirs = student(**inputs).logits.log_softmax(-1), teacher(**inputs).logits.log_softmax(-1)
    torch.testing.assert_close(found["divergence"].detach(), divergence("js", theirs, ours), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found["kl"].detach(), reference_kl(ours, theirs), rtol=1e-3, atol=1e-5)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most elements that any result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_logits_of_all_tokens_are_never_held() -> None:
    config = tf.LlamaConfig(
        vocab_size=4000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    student, teacher = (tf.AutoModelForCausalLM.from_config(config) for _ in range(2))
    inputs = {"input_ids": torch.randint(0, 4000, (4, 64))}
    with Largest() as largest:  # type: ignore[no-untyped-call]
        losses_of(student, teacher, inputs, chunk_tokens=32)
    weights = 4000 * 16
    assert largest.elements == max(32 * 4000, weights)


SHARDED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from blockspin.distillation.loss import DistillationLoss, split, training_forward

torch.distributed.init_process_group("gloo")
mesh, rank = init_device_mesh("cpu", (2,)), torch.distributed.get_rank()
teacher, whole, sharded = tiny_model("llama", seed=2), tiny_model("llama", seed=1), tiny_model("llama", seed=1)
token_ids = torch.randint(2, 64, (4, 12), generator=torch.Generator().manual_seed(0))
for student, rows in ((whole, token_ids), (sharded, token_ids[2 * rank : 2 * rank + 2])):
    with training_forward(DistillationLoss(split(student), split(teacher), chunk_tokens=5, kept=[0, 1, 2, 3])):
        if student is sharded:
            for layer in student.model.layers:
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            fully_shard(student, mesh=mesh, reshard_after_forward=True)
        losses = student(input_ids=rows)
        (losses["kl"].mean() + losses["hidden"].mean()).backward()
for a, b in zip(whole.parameters(), sharded.parameters(), strict=True):
    torch.testing.assert_close(b.grad.full_tensor(), a.grad, rtol=1e-3, atol=1e-5)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_student_sharded_by_fsdp_gets_the_same_gradients(tmp_path: Path) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED)
    here = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, *TWO_PROCESSES, str(tmp_path / "sharded.py"), here], check=True)
