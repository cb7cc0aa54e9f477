"""LoRA adapters of peft on patched models: patched before wrapping and after."""

import copy

import pytest
import torch
from host_models import check_close, check_equal, disturb

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import xformer_fast  # noqa: E402

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": ("LlamaForCausalLM", SIZES | {"num_key_value_heads": 2}, ["q_proj", "v_proj"]),
    "bert": ("BertModel", SIZES, ["query", "value"]),
}


def tokens():
    mask = torch.arange(13) < torch.tensor([13, 7, 10])[:, None]
    ids = torch.randint(3, 99, (3, 13), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def run(model):
    inputs = tokens()
    out = model(**inputs)
    return (out.logits if "logits" in out else out.last_hidden_state)[inputs["attention_mask"].bool()]


def wrap(model, targets):
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets, lora_dropout=0.0))
    for parameter in wrapped.parameters():  # LoRA's second factor starts at zero
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return wrapped


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_lora(name, before, tmp_path, proof):
    kind, config, targets = MODELS[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = disturb(cls(cls.config_class(**config))).eval()
    patched = copy.deepcopy(model)
    if before:
        assert xformer_fast.patch(patched).count == 2
    reference, patched = wrap(copy.deepcopy(model), targets), wrap(patched, targets)
    if not before:
        assert xformer_fast.patch(patched).count == 2
    assert "xformer_fast" in patched.base_model.model.config._attn_implementation
    assert patched.config is patched.base_model.model.config
    errors = check_equal(reference, patched, run)
    when = "patched before wrapping" if before else "patched after wrapping"
    proof("peft", f"LoRA on {name}, {when}", 2, ["right padding"], [errors])

    patched.save_pretrained(tmp_path)
    check_close(peft.PeftModel.from_pretrained(model, tmp_path), patched, run)
    merged = patched.merge_and_unload()
    check_close(reference, merged, run)
    xformer_fast.unpatch(merged)
    assert merged.config._attn_implementation == "sdpa"
