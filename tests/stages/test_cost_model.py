"""The cost model against what it stands for: tensors that autograd really keeps, files that were really written."""

from dataclasses import replace

import pytest
import torch

from kvcalib.calibration.fisher import PassSettings, run_pass
from kvcalib.model.footprint import dimensions
from kvcalib.model.identity import identify
from kvcalib.model.selftest import full_attention_layers
from kvcalib.rundir import CALIBRATION, CODEBOOKS
from kvcalib.runtime.loader import prove
from kvcalib.stages import cost_model
from kvcalib.stages.cost_model import Plan, Rates, costs, saved_bytes
from kvcalib.stages.evaluate import EvalSettings
from kvcalib.stages.fisher import FisherSettings
from kvcalib.stages.fit_nuq import FitNuqSettings
from tests.tiny import make_run, tiny_llama, tokens

RATES = Rates(1e11, 1e10, 4)


def plan(model, folder, **settings):
    model.config.save_pretrained(folder)
    found = dimensions(str(folder))
    return Plan(found, FisherSettings(**settings), FitNuqSettings(), EvalSettings(), found.layers, 4, False)


@pytest.mark.parametrize(
    "shape",
    [
        {}, {"hidden_size": 128}, {"intermediate_size": 512}, {"num_hidden_layers": 5}, {"head_dim": 32},
        {"num_attention_heads": 8}, {"num_key_value_heads": 4}, {"vocab_size": 1000},
    ],
    ids=str,
)  # fmt: skip
def test_pass_keeps_what_autograd_keeps(tmp_path, shape):
    """All tensors that are saved for the way back and are no weights, each storage once; without the loss's gradients
    and the blocks of attention, which are not saved."""
    model = tiny_llama(**shape)
    said = plan(model, tmp_path, samples=2, seq_len=128, batch_size=2)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    held = []

    def pack(x):
        held.append(x)  # so that no other tensor takes its place
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    rotations = prove(model, full_attention_layers(model))
    settings = PassSettings("test", 0, 16, 5, 2, "0" * 64, checkpointing=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run_pass(model, rotations, tokens(2, 128, 1).numpy(), identify(model), settings)
    m = said.model
    not_saved = 2 * 128 * 2 * m.vocabulary * 4 + 3 * 2 * m.query_heads * 128 * 128 * 4
    assert saved_bytes(said) - not_saved == pytest.approx(sum(saved.values()), rel=0.06)


def test_files_are_as_large_as_said(tmp_path):
    model = tiny_llama(num_hidden_layers=3)
    run = make_run(tmp_path / "run", model)
    said = plan(model, tmp_path / "config", samples=4, seq_len=48, keep_tokens=160)
    found = {cost.stage: cost for cost in costs(said, RATES)}
    for stage, name in (("fisher", CALIBRATION), ("fit-nuq", CODEBOOKS)):
        size = run.file(name).stat().st_size
        header = int.from_bytes(run.file(name).read_bytes()[:8], "little") + 8
        assert found[stage].disk == pytest.approx(size - header, rel=0.02), stage


def test_more_processes_take_a_share_each(tmp_path):
    said = plan(tiny_llama(), tmp_path, samples=64, seq_len=512)
    alone, four = (costs(p, RATES) for p in (said, replace(said, processes=4, local=1)))
    start = cost_model.Constants().start + cost_model.Constants().proof
    assert (four[0].seconds - start) * 4 == pytest.approx(alone[0].seconds - start, rel=0.05)
    assert four[0].host == pytest.approx(alone[0].host)


def test_long_batches_are_checkpointed(tmp_path):
    said = plan(tiny_llama(num_hidden_layers=40), tmp_path, samples=2, seq_len=2048, batch_size=2)
    longer = plan(tiny_llama(num_hidden_layers=40), tmp_path, samples=4, seq_len=2048, batch_size=4)
    assert saved_bytes(longer) < saved_bytes(said)
