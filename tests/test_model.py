"""CT-SFT inside peft, transformers and TRL: registration, adapters beside each other, training."""

import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model

from ctsft import CTConfig, CTError, save_adapter
from helpers import (
    adapt,
    assert_close,
    assert_same_bits,
    coefficients,
    ids,
    logits,
    owners,
    randomise,
    ready_config,
    tiny,
    twin,
)

# ---- registration


def python(code):
    """Run `code` in a fresh interpreter, where every warning is an error, and return what it printed."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_import_alone_costs_nothing_and_a_later_import_of_peft_registers():
    code = (
        "import sys, ctsft; print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)));"
        "import peft; from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m; print('CTSFT' in m);"
        "import importlib; importlib.reload(ctsft); ctsft.register(None); print(list(m).count('CTSFT'), ctsft.CTConfig)"
    )
    assert python(code).split("\n") == ["[]", "True", "1 <class 'ctsft.adapter.config.CTConfig'>"]


@pytest.mark.parametrize("name", ["adapter.layer", "adapter.calibrate", "lab.run"])
def test_a_file_of_ctsft_that_is_imported_first_registers_too(name):
    code = f"import ctsft.{name}, peft\nfrom peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as m; print('CTSFT' in m)"
    assert python(code) == "True"


def test_what_ctsft_has_not_is_an_attribute_error():
    import ctsft

    with pytest.raises(AttributeError, match="module 'ctsft' has no attribute 'nothing'"):
        _ = ctsft.nothing
    assert all(getattr(ctsft, name) is not None for name in ctsft.__all__)


# ---- adapters beside each other


def test_a_second_adapter_is_refused_while_one_is_merged(tmp_path):
    model = randomise(adapt(tiny()))
    save_adapter(model, tmp_path / "a")
    model.merge_adapter()
    merged = logits(model)
    for add in (lambda: model.add_adapter("two", CTConfig(k=2)), lambda: model.load_adapter(tmp_path / "a", "two")):
        with pytest.raises(
            CTError, match=r"merged into these weights, so a new basis would be that of W \+ dW; unmerge"
        ):
            add()
    assert list(model.peft_config) == ["default"]
    assert_same_bits(logits(model), merged)
    model.unmerge_adapter()
    model.add_adapter("two", CTConfig(k=2))


def test_a_refused_second_adapter_leaves_the_first_at_work():
    model = randomise(adapt(tiny()))
    before = logits(model)
    with pytest.raises(CTError, match="k=99"):
        model.add_adapter("two", CTConfig(k=99))
    assert list(model.peft_config) == ["default"]
    assert_same_bits(logits(model), before)


def test_several_adapters_in_one_batch_are_refused():
    model = adapt(tiny())
    model.add_adapter("two", CTConfig(k=2))
    names = ["default", "two", "__base__"]
    for use in (model, model.generate):
        with pytest.raises(CTError, match=r"adapter_names= .* not supported; call set_adapter"):
            use(input_ids=ids(), adapter_names=names)


def test_a_deleted_adapter_can_be_made_again_and_starts_at_zero(tmp_path):
    model = randomise(adapt(tiny(), target_modules=["q_proj", "lm_head"]))
    save_adapter(model, tmp_path / "a")
    pending = get_peft_model(tiny(), CTConfig.from_pretrained(tmp_path / "a"))
    for m in (model, pending):
        m.add_adapter("two", CTConfig(k=2))
        m.set_adapter("two")
        m.delete_adapter("default")
        m.add_adapter("default", CTConfig(k=3, target_modules=["q_proj", "lm_head"]))
        m.set_adapter("default")
        assert_same_bits(logits(m), logits(tiny()))
        assert_close(logits(randomise(m)), logits(twin(m, tiny())), 1e-5)


def test_broken_numbers_are_not_merged_safely():
    model = adapt(tiny())
    next(iter(coefficients(model).values())).data[0] = float("nan")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CTError, match=r"merging \['default'\] would give NaN or infinite weights"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(model.parameters(), before, strict=True))


# ---- transformers


def test_transformers_own_add_adapter_works_and_trains():
    model, before = tiny(), logits(tiny())
    model.add_adapter(CTConfig(k=4))
    assert_same_bits(logits(model), before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(owners(model)) == 14
    model.train()
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(model(input_ids=ids(), labels=ids()).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    adapted = logits(model)
    assert_close(adapted, logits(twin(model, tiny())), 1e-5)
    model.disable_adapters()
    assert_same_bits(logits(model), before)
    model.enable_adapters()
    assert_same_bits(logits(model), adapted)


def test_transformers_own_loading_is_never_silently_wrong(tmp_path):
    saved = randomise(adapt(tiny()))
    save_adapter(saved, tmp_path / "a")
    model = tiny()
    model.load_adapter(str(tmp_path / "a"))
    assert_same_bits(logits(model), logits(saved))

    without = get_peft_model(tiny(), CTConfig.from_pretrained(str(tmp_path / "a")))  # settings of a file, no numbers
    with pytest.raises(CTError, match=r"weights were never loaded; use peft\.PeftModel\.from_pretrained"):
        logits(without)


# ---- TRL


class Stop(Exception):
    pass


def trainer(base, folder, config, steps=4, stop_at=None):
    """A TRL trainer on rows of random tokens; raises Stop after the checkpoint of step `stop_at`."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Stopping(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == stop_at:
                raise Stop

    rows = [{"input_ids": row.tolist()} for row in ids(8, 10, seed=4)]
    settings = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        disable_tqdm=True,
        logging_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=3,
    )
    return SFTTrainer(
        base,
        settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=[Stopping()],
    )


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(37)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), eos_token="0", pad_token="1"
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"form": "scores", "basis": "universal", "k": {"q_proj": 2, ".*": 4}}, {"basis": "gradient"}],
    ids=str,
)
def test_trl_trains_saves_and_resumes_to_the_same_numbers(options, tmp_path):
    def fresh(folder, **more):
        base = tiny()
        return trainer(base, tmp_path / folder, ready_config(base, **options), **more)

    whole = fresh("whole")
    before = [c.detach().clone() for c in coefficients(whole.model).values()]
    whole.train()
    after = coefficients(whole.model)
    assert all(not torch.equal(a, b) for a, b in zip(after.values(), before, strict=True))
    assert all(c.dtype == torch.float32 for c in after.values())

    with pytest.raises(Stop):
        fresh("broken", stop_at=2).train()
    resumed = fresh("broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for name, c in coefficients(resumed.model).items():
        assert_same_bits(c, after[name])

    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "whole" / "checkpoint-4").eval()
    assert_same_bits(logits(loaded), logits(whole.model.eval()))


def test_trl_refuses_an_adapted_head_whichever_use_was_named(tmp_path):
    """TRL reads `lm_head.weight` past any adapter; the tie must not hide the adapter from its check."""
    for name in ("lm_head", "embed_tokens"):
        with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
            trainer(tiny(), tmp_path, CTConfig(k=2, target_modules=[name]))
