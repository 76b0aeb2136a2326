"""Several threads on one attached model: each gets what it gets alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kvcalib
from tests.tiny import tokens

THREADS, STEPS = 4, 12


@pytest.fixture(params=[{}, {"keep": 20, "policy": "h2o"}, {"prefill": "exact", "sinks": 2, "recent": 4}], ids=str)
def attachment(case, request):
    model, artifact, rotations = case("llama")
    yield kvcalib.attach(model, artifact, rotations=rotations, **request.param)
    kvcalib.detach(model)


def logits(model, number):
    """A left-padded prompt of its own length, then token by token."""
    prompt, cache, found = 17 + 3 * number, None, []
    ids = tokens(2, prompt + STEPS, seed=number)
    mask = torch.ones_like(ids)
    mask[1, : 2 * number] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = range(prompt, prompt + STEPS + 1)
    with torch.no_grad():
        for start, end in zip([0, *ends], ends, strict=False):
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            out = model(ids[:, start:end], past_key_values=cache, **given)
            cache = out.past_key_values
            found.append(out.logits)
    return torch.cat(found, 1)


def together(*jobs):
    """Run the jobs at once, a thread each, all starting together."""
    start = threading.Barrier(len(jobs))

    def work(job):
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(work, jobs))


def test_each_thread_gets_what_it_gets_alone(attachment):
    model = attachment.model
    alone = [logits(model, number) for number in range(THREADS)]
    for _ in range(3):
        found = together(*(lambda number=number: logits(model, number) for number in range(THREADS)))
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_a_bypass_is_one_threads_own(attachment):
    model = attachment.model
    quantized = logits(model, 0)
    with attachment.bypass():
        plain = logits(model, 0)
    assert not torch.equal(plain, quantized)

    def bypassed():
        with attachment.bypass():
            return logits(model, 0)

    found = together(bypassed, lambda: logits(model, 0), bypassed)
    assert [torch.equal(x, plain) for x in found] == [True, False, True]
    assert torch.equal(found[1], quantized)


def test_caches_that_live_for_a_call_are_each_threads_own(attachment):
    model = attachment.model
    with torch.no_grad():
        alone = [model(tokens(1, 9 + n, n), use_cache=False).logits for n in range(THREADS)]
        jobs = [lambda n=n: torch.no_grad()(model)(tokens(1, 9 + n, n), use_cache=False) for n in range(THREADS)]
        for _ in range(3):
            found = together(*jobs)
            assert all(out.past_key_values is None for out in found)
            assert all(torch.equal(a, out.logits) for a, out in zip(alone, found, strict=True))


def test_a_detach_under_a_thread_that_generates_is_its_error(case):
    model, artifact, rotations = case("llama")
    attachment = kvcalib.attach(model, artifact, rotations=rotations)
    begun = threading.Event()

    def generate():
        cache = attachment.make_cache()
        for number in range(100_000):
            with torch.no_grad():
                model(tokens(1, 1, number), past_key_values=cache)
            begun.set()

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(generate)
        begun.wait()
        kvcalib.detach(model)
        with pytest.raises(RuntimeError, match=r"only an attached model can read it; call kvcalib.attach"):
            job.result()
