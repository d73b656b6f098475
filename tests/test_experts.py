"""LoRA on parameters that a module reads itself: the experts of a Mixture of Experts, and its router."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import assert_as_good_as, assert_equal, logits, pooled, randomise, step
from torch import Tensor, nn

import peftkern

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from peftkern.integrations.peft import experts as integration  # noqa: E402
from peftkern.integrations.peft import low_rank_stack  # noqa: E402

if not hasattr(peft.tuners.lora.layer, "ParamWrapper"):
    pytest.skip("PEFT before 0.17 has no target_parameters", allow_module_level=True)

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
SHARED = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=32, num_experts_per_tok=2, initializer_range=0.2, use_cache=False,
)  # fmt: skip
QWEN = dict(moe_intermediate_size=24, num_experts=5, norm_topk_prob=True)
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHARED, num_local_experts=4))
    if family == "qwen2_moe":
        config = transformers.Qwen2MoeConfig(**SHARED, **QWEN, shared_expert_intermediate_size=16)
        return transformers.Qwen2MoeForCausalLM(config)
    if family == "qwen3_moe":
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SHARED, **QWEN, head_dim=8))
    config = transformers.GptOssConfig(**SHARED, num_local_experts=4, head_dim=8, pad_token_id=0, eos_token_id=1)
    return transformers.GptOssForCausalLM(config)


def adapted(family: str = "mixtral", implementation: str = "eager", dtype: torch.dtype = F32, **options) -> nn.Module:
    model = build(family).to(dtype)
    model.set_experts_implementation(implementation)
    settings = dict(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=PARAMETERS) | options
    return randomise(peft.get_peft_model(model, peft.LoraConfig(**settings)))


def wrappers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, integration.PeftParamWrapper)}


@pytest.fixture
def products(monkeypatch):
    """The rows of each product that a LowRankStack computed."""
    rows: list[int] = []
    for name in ("run", "lora_linear"):
        genuine = getattr(low_rank_stack, name)

        def spy(x, *arguments, genuine=genuine, **options):
            rows.append(x.shape[:-1].numel())
            return genuine(x, *arguments, **options)

        monkeypatch.setattr(low_rank_stack, name, spy)
    return rows


@pytest.fixture
def folds(monkeypatch):
    """The parameters that were folded whole after all."""
    names: list[str] = []
    genuine = integration._Fold.__call__

    def spy(self):
        names.append(self.layer.parameter_name)
        return genuine(self)

    monkeypatch.setattr(integration._Fold, "__call__", spy)
    return names


# --------------------------------------------------------------------------------------------- the same numbers as PEFT


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_loss_and_gradients_are_pefts(family, implementation, products, folds):
    """gpt_oss keeps its experts as [E, in, out], and names its router otherwise."""
    model = adapted(family, implementation)
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # torch's grouped product knows no fp64
    expected, truth = step(model), step(exact)
    report = peftkern.patch(model)
    assert not report.skipped and set(wrappers(model)) <= set(report.fast)
    assert len(wrappers(model)) == (4 if family == "gpt_oss" else 6)
    found = step(model)
    assert products and not folds
    assert found.keys() == expected.keys()
    assert [v.dtype for v in found.values()] == [expected[n].dtype for n in found]
    torch.testing.assert_close(found["loss"], expected["loss"])
    assert_as_good_as(pooled(found, truth), pooled(expected, truth), pooled(truth, truth), "the gradients")


def test_fp64_is_pefts_to_fp64(folds):
    model = adapted(dtype=F64)
    expected = step(model)
    peftkern.patch(model)
    torch.testing.assert_close(step(model), expected, rtol=1e-11, atol=1e-14)
    assert not folds


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("mode", ["bf16 base, fp32 adapters", "autocast"])
def test_narrow_products(mode, implementation, products, folds):
    """At most twice PEFT's own error against fp64; the routing, which a rounding can turn, is held still."""
    model = adapted("mixtral", implementation, BF16 if mode != "autocast" else F32)
    layer = model.base_model.model.model.layers[0].mlp.experts
    assert layer.lora_A["default"].weight.dtype == F32
    exact = copy.deepcopy(layer).double()
    exact.get_base_layer().config._experts_implementation = "eager"
    T = 40
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(T, 32, generator=generator).to(F32 if mode == "autocast" else BF16)
    chosen = torch.rand(T, 4, generator=generator).topk(2).indices
    gate, dy = torch.rand(T, 2, generator=generator), torch.randn(T, 32, generator=generator)

    def run(layer: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        layer.zero_grad()
        leaf = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", BF16, enabled=mode == "autocast" and dtype != F64):
            y = layer(leaf, chosen, gate.to(dtype))
        y.backward(dy.to(y.dtype))
        return {"y": y.detach(), "x": leaf.grad} | {
            n: p.grad.clone() for n, p in layer.named_parameters() if "lora" in n
        }

    truth = run(exact, F64)
    expected = run(layer, x.dtype)
    peftkern.patch(layer)
    found = run(layer, x.dtype)
    assert products and not folds
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in expected.items()}
    for name in truth:
        assert_as_good_as(found[name], expected[name], truth[name], name)


def test_all_linear_finds_experts_and_router(products):
    model = adapted(target_modules="all-linear", target_parameters=None)
    text, keys = str(model), list(model.state_dict())
    report = peftkern.patch(model)
    assert not report.skipped and len(report.fast) == 14 and "14 of 14 LoRA layers are fused" in str(report)
    assert set(wrappers(model)) <= set(report.backends) and len(wrappers(model)) == 6
    step(model)
    assert products and (str(model), list(model.state_dict())) == (text, keys)


def test_an_expert_without_tokens_has_exactly_zero_gradients():
    model = adapted()
    expected, truth = step_of_one_token(model), step_of_one_token(copy.deepcopy(model).double())
    peftkern.patch(model)
    found = step_of_one_token(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if "experts" in name:
            E = 4
            by_expert = (
                gradient.unflatten(0, (E, -1)) if "lora_A" in name else gradient.unflatten(1, (-1, E)).movedim(2, 0)
            )
            used = by_expert.flatten(1).any(1)
            assert used.sum() == 2, name  # of the two experts that the token went to
            assert_as_good_as(gradient, expected[name], truth[name], name)


def step_of_one_token(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=torch.tensor([[7]])).logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_second_step_and_gradient_checkpointing_give_the_same_bits(reentrant, folds):
    model = adapted("qwen3_moe", "grouped_mm")
    peftkern.patch(model)
    expected = step(model)
    assert_equal(step(model), expected)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    assert_equal(step(model), expected)
    assert not folds


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_nothing_of_the_size_of_a_stack_is_kept_for_backward(implementation):
    model = adapted("mixtral", implementation)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    stack = model.base_model.model.model.layers[0].mlp.experts.get_base_layer().down_proj.untyped_storage().nbytes()

    def largest() -> int:
        sizes = [0]

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes.append(storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logits(model)
        return max(sizes)

    assert largest() >= stack  # PEFT keeps the folded parameter
    peftkern.patch(model)
    assert largest() < stack / 2


# ------------------------------------------------------------------------------ what is not fast is PEFT's, bit for bit


class Unknown(nn.Module):
    """Experts of nobody whose forward is known."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("mk,enk->mn", x, self.down_proj)


def test_an_unknown_module_runs_pefts_forward(products):
    holder = nn.ModuleDict({"experts": Unknown()})
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    model = randomise(peft.get_peft_model(holder, config))
    x = torch.randn(3, 6)
    wrapper = model.base_model.model["experts"]
    expected = wrapper(x)
    report = peftkern.patch(model)
    assert list(report.skipped.values()) == [
        f"its module's forward is {Unknown.forward.__module__}'s, which may do more with down_proj than products"
    ]
    assert torch.equal(wrapper(x), expected) and not products


def two(model: nn.Module) -> None:
    settings = dict(r=2, target_modules=["q_proj"], target_parameters=PARAMETERS)
    model.add_adapter("other", peft.LoraConfig(**settings))
    randomise(model)
    model.base_model.set_adapter(["default", "other"])


def replace_forward(model: nn.Module) -> None:
    for layer in wrappers(model).values():
        base = layer.get_base_layer()
        base.forward = type(base).forward.__get__(base)


def unfreeze(model: nn.Module) -> None:
    for layer in wrappers(model).values():
        layer.get_param().requires_grad_()


STATES = {
    "its adapter is merged": lambda model: model.merge_adapter(),
    "its adapters are disabled": lambda model: model.base_model.disable_adapter_layers(),
    "2 adapters are active on its parameter": two,
    "experts_implementation='batched_mm' is not one of eager, grouped_mm": (
        lambda model: model.set_experts_implementation("batched_mm")
    ),
    "its module has a replaced forward": replace_forward,
    "its base parameter requires grad": unfreeze,
}


@pytest.mark.parametrize("reason", STATES)
def test_states_that_are_pefts_own(reason, products, one_thread):
    model = adapted()
    peftkern.patch(model)
    STATES[reason](model)
    report = peftkern.patch(model)
    assert {report.skipped.get(name) for name in wrappers(model) if "experts" in name} == {reason}
    found = run_experts(model)
    assert not products
    peftkern.unpatch(model)
    assert_equal(found, run_experts(model))


def test_a_block_of_disabled_is_pefts_own(products):
    model = adapted()
    expected = run_experts(model)
    peftkern.patch(model)
    with peftkern.disabled():
        assert_equal(run_experts(model), expected)
    assert not products


def test_a_state_that_ends_is_fast_again(products, folds):
    model = adapted()
    peftkern.patch(model)
    two(model)
    model.base_model.set_adapter("default")
    before = run_experts(model)
    model.base_model.set_adapter(["default", "other"])
    logits(model)
    with model.disable_adapter():
        logits(model)
    model.base_model.set_adapter("default")
    model.merge_adapter()
    logits(model)
    model.unmerge_adapter()
    products.clear()
    torch.testing.assert_close(run_experts(model), before, rtol=1e-4, atol=1e-5)  # unmerging leaves a rounding
    assert products and not folds


def run_experts(model: nn.Module, rows: int = 20) -> dict[str, Tensor]:
    """y, dx and the gradients of one layer's experts, routed at random."""
    layer = model.base_model.model.model.layers[0].mlp.experts
    layer.zero_grad()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 32, generator=generator).requires_grad_()
    chosen = torch.rand(rows, 4, generator=generator).topk(2).indices
    y = layer(x, chosen, torch.rand(rows, 2, generator=generator))
    y.backward(torch.randn(y.shape, generator=generator))
    gradients = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | gradients


def test_an_error_in_forward_leaves_the_module_as_it_was():
    model = adapted()
    peftkern.patch(model)
    layer = model.base_model.model.model.layers[0].mlp.experts
    base = layer.get_base_layer()
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 7), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
    assert "gate_up_proj" not in base.__dict__ and "down_proj" not in base.__dict__
    assert base.gate_up_proj is base._parameters["gate_up_proj"]


# -------------------------------------------------------------------------------------- saving, copying, other adapters


def test_an_adapter_trained_here_loads_into_plain_peft(tmp_path):
    model = adapted()
    peftkern.patch(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step(model)
    optimiser.step()
    model.save_pretrained(tmp_path)
    base = build("mixtral")
    base.set_experts_implementation("eager")
    plain = peft.PeftModel.from_pretrained(base, tmp_path)
    trained = {n: p for n, p in model.state_dict().items() if "lora_" in n}
    assert_equal({n: p for n, p in plain.state_dict().items() if "lora_" in n}, trained)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    merged = logits(model.merge_and_unload())
    torch.testing.assert_close(merged, logits(plain), rtol=1e-4, atol=1e-5)


def test_copies_and_unpatching(products):
    model = adapted()
    classes = [type(module) for module in model.modules()]
    before = logits(model)
    peftkern.patch(model)
    ours = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        products.clear()
        assert torch.equal(logits(copied), ours) and products
    peftkern.unpatch(model)
    products.clear()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(logits(model), before) and not products


def test_an_adapter_added_after_patch(products, folds):
    model, later = adapted(), adapted()
    peftkern.patch(model)
    for one in (model, later):
        settings = dict(r=2, target_modules=["q_proj"], target_parameters=PARAMETERS)
        one.add_adapter("other", peft.LoraConfig(**settings))
        randomise(one, seed=5)
        one.set_adapter("other")
    torch.testing.assert_close(logits(model), logits(later), rtol=1e-4, atol=1e-5)
    assert products and not folds


def test_a_scaling_that_is_a_tensor(products, folds):
    """Hot-swapping makes it one."""
    model = adapted()
    peftkern.patch(model)
    for layer in wrappers(model).values():
        layer.scaling["default"] = 0.75
    expected = run_experts(model)
    for layer in wrappers(model).values():
        layer.scaling["default"] = torch.tensor(0.75)
    torch.testing.assert_close(run_experts(model), expected)
    assert products and not folds
