"""Trainers that make or wrap the optimizer: Hugging Face's Trainer, Accelerate, Lightning, skorch.

Each trains a small network with fastadam.torch by the line that the guide gives, and a run that is resumed from a
checkpoint has the bits of the uninterrupted one.
"""

from __future__ import annotations

import logging

import pytest
from absent import need

torch = pytest.importorskip("torch")

import fastadam.torch  # noqa: E402
from torch_network import BATCHES, assert_same, batches, bits, network  # noqa: E402

# Of the trainers: a process group, workers and devices that the CPU does not have, and functions they plan to rename.
pytestmark = pytest.mark.filterwarnings("ignore")
slow = pytest.mark.slow  # of packages that take seconds to import


@pytest.fixture(autouse=True)
def _random_numbers():
    torch.manual_seed(0)


def assert_trained(model, before):
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


# ---- Hugging Face's Trainer ------------------------------------------------------------------------------------------


def language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def trainer_of(folder, model, options=None, **given):
    transformers = pytest.importorskip("transformers")
    need("accelerate")
    generator = torch.Generator().manual_seed(2)
    sentences = [torch.randint(0, 17, (8,), generator=generator) for _ in range(24)]
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        warmup_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **(options or {}),
    )
    data = [{"input_ids": each, "labels": each} for each in sentences]
    return transformers.Trainer(model=model, args=arguments, train_dataset=data, **given)


def with_class(folder, options=None, **settings):
    settings = {"lr": 0.01, **settings}
    return trainer_of(folder, language_model(), options, optimizer_cls_and_kwargs=(fastadam.torch.AdamW, settings))


def with_optimizer(folder):
    model = language_model()
    optimizer = fastadam.torch.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return trainer_of(folder, model, optimizers=(optimizer, scheduler))


def inner(trainer):
    """The optimizer inside Accelerate's."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


@slow
@pytest.mark.parametrize(
    "make",
    [
        with_class,
        with_optimizer,
        lambda folder: with_class(folder, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
        lambda folder: with_class(folder, {"max_grad_norm": 0.0}, global_clipnorm=0.1),
        lambda folder: with_class(folder, {"bf16": True}, moments="8bit"),
    ],
    ids=["class", "optimizer", "accumulated", "clips by itself", "bf16, 8-bit moments"],
)
def test_a_trainer_resumes_with_the_bits_of_the_uninterrupted_run(make, tmp_path):
    whole = make(tmp_path)
    before = [p.detach().clone() for p in whole.model.parameters()]
    whole.train()
    assert type(inner(whole)) is fastadam.torch.AdamW
    assert_trained(whole.model, before)
    resumed = make(tmp_path)  # which sets the seed, and so the order of the data
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_same(bits(resumed.model, inner(resumed)), bits(whole.model, inner(whole)))


@slow
def test_a_trainer_sets_the_decay_and_leaves_the_rate_to_the_keywords(tmp_path):
    """It makes two groups, as for its own AdamW: biases and norms do not decay."""
    trainer = with_class(tmp_path, {"weight_decay": 0.25}, lr=0.5)
    trainer.create_optimizer()
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.25, 0.0]
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.5, 0.5]


# ---- Accelerate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def prepared(accelerator, **options):
    model = network()
    optimizer = fastadam.torch.AdamW(model.parameters(), lr=0.1, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return accelerator.prepare(model, optimizer, scheduler)


def train(accelerator, model, optimizer, scheduler, data):
    for batch in data:
        optimizer.zero_grad()
        accelerator.backward(model(batch).square().mean())
        optimizer.step()
        scheduler.step()


def test_accelerate_saves_and_loads_to_the_bit(accelerator, tmp_path):
    model, optimizer, scheduler = prepared(accelerator)
    data = batches()
    train(accelerator, model, optimizer, scheduler, data[:4])
    accelerator.save_state(tmp_path)
    train(accelerator, model, optimizer, scheduler, data[4:])
    expected = bits(model, optimizer.optimizer)
    rate = scheduler.get_last_lr()
    accelerator.load_state(tmp_path)  # with the generators of random numbers, which dropout uses
    train(accelerator, model, optimizer, scheduler, data[4:])
    assert_same(bits(model, optimizer.optimizer), expected)
    assert scheduler.get_last_lr() == rate


@pytest.mark.parametrize("kind", [torch.optim.AdamW, fastadam.torch.AdamW])
def test_a_scheduler_of_accelerate_waits_for_a_skipped_step(accelerator, kind):
    """With an overflow in the second of four steps."""
    accelerate = pytest.importorskip("accelerate")
    model = network()
    optimizer = kind(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
    waiting = accelerate.scheduler.AcceleratedScheduler(scheduler, wrapped)
    seen = []
    for k, batch in enumerate(batches()[:4]):
        wrapped.zero_grad()
        scaler.scale(model(batch).square().mean()).backward()
        if k == 1:
            model[0].weight.grad[0, 0] = float("inf")
        wrapped.step()
        waiting.step()
        seen.append((wrapped.step_was_skipped, scheduler.get_last_lr()[0]))
    assert seen == [(False, 0.5), (True, 0.5), (False, 0.25), (False, 0.125)]


def test_accelerate_accumulates_and_clips():
    """A step is made after every second batch, and has the numbers of torch's optimizer."""
    accelerate = pytest.importorskip("accelerate")

    def trained(kind):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network()
        model, optimizer = accelerator.prepare(model, kind(model.parameters(), lr=0.1, eps=1e-3))
        for batch in batches():
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        steps = {float(state["step"]) for state in optimizer.optimizer.state.values()}
        return list(model.parameters()), steps

    torch.manual_seed(0)
    (theirs, counts), (ours, steps) = trained(torch.optim.AdamW), trained(fastadam.torch.AdamW)
    assert steps == counts == {BATCHES / 2}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- Lightning -------------------------------------------------------------------------------------------------------


def lightning_module(**options):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, _):
            return self.network(batch).square().mean()

        def configure_optimizers(self):
            optimizer = fastadam.torch.AdamW(self.parameters(), lr=0.1, **options)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    return Module()


def fit(folder, epochs, options, resume=None, **settings):
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    saves = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saves],
        **settings,
    )
    torch.manual_seed(3)
    module = lightning_module(**options)
    module.network[1].p = 0.0  # Lightning does not save the generators of random numbers
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None), ckpt_path=resume)
    return module, trainer.optimizers[0]


@slow
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"precision": "bf16-mixed", "gradient_clip_val": 0.05}, {}),
        ({"precision": "bf16-mixed", "gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}, {}),
        ({"precision": "bf16-mixed"}, {"fused": True, "global_clipnorm": 0.05}),  # Lightning clips for no fused one
        ({"precision": "bf16-true", "accumulate_grad_batches": 2}, {"master": "float32"}),
    ],
    ids=["plain", "mixed, clipped", "mixed, clipped by value", "mixed, fused", "bfloat16 with masters"],
)
def test_lightning_resumes_with_the_bits_of_the_uninterrupted_run(settings, options, tmp_path):
    found, optimizer = fit(tmp_path, 3, options, **settings)
    assert type(optimizer) is fastadam.torch.AdamW
    fit(tmp_path / "first", 2, options, **settings)
    resumed, other = fit(tmp_path, 3, options, tmp_path / "first" / "epoch=1.ckpt", **settings)
    assert_same(bits(resumed, other), bits(found, optimizer))
    assert_trained(found.network, list(network().to(next(found.parameters()).dtype).parameters()))


@slow
def test_the_clipping_of_lightning_is_torchs(tmp_path):
    """The gradients that the optimizer gets, under mixed precision."""
    pytest.importorskip("lightning")
    settings = {"precision": "bf16-mixed", "gradient_clip_val": 0.05}
    _, optimizer = fit(tmp_path, 1, {"telemetry": True}, **settings)
    assert 0.04 < optimizer.telemetry().total()["gradient_norm"] <= 0.05 * (1 + 1e-4)


# ---- skorch ----------------------------------------------------------------------------------------------------------


def regressor(**options):
    skorch = pytest.importorskip("skorch")
    return skorch.NeuralNetRegressor(
        network, optimizer=fastadam.torch.AdamW, lr=0.1, max_epochs=2, batch_size=6, verbose=0, **options
    )


def test_skorch_resumes_to_the_bit(tmp_path):
    data = torch.cat(batches())
    x, y = data.numpy(), data.sum(1, keepdim=True).numpy()
    settings = {"optimizer__weight_decay": 0.25, "train_split": None, "iterator_train__shuffle": False}
    found = regressor(**settings).fit(x, y)
    assert type(found.optimizer_) is fastadam.torch.AdamW
    assert found.optimizer_.param_groups[0]["weight_decay"] == 0.25
    names = {f"f_{part}": str(tmp_path / part) for part in ("params", "optimizer", "history")}
    found.save_params(**names)
    resumed = regressor(**settings).initialize()
    resumed.load_params(**names)
    for net in (found, resumed):
        torch.manual_seed(5)  # for dropout
        net.partial_fit(x, y)
    assert_same(bits(resumed.module_, resumed.optimizer_), bits(found.module_, found.optimizer_))
