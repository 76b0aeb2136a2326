"""`kvcalib eval` with eviction, summaries and passkeys, as a user meets it."""

import json
import shutil

import pytest

from kvcalib.demo import MODEL_DIR
from tests.test_cli import VOCABULARY, ok, refused
from tests.tiny import make_artifact, tiny_llama, tokens

CONTEXT = 512
FP16_PLAIN_WINDOW = [(True, None), (False, None), (False, "window")]
TEXT = ("--samples", 3, "--seq-len", 64)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model with the demo's tokenizer, an artifact of 3 bits, text and articles."""
    home = tmp_path_factory.mktemp("eval")
    model = tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    model.save_pretrained(home / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, home / "model")
    make_artifact(home, model, key_bits=3, value_bits=3)
    (home / "text.jsonl").write_text(
        "".join(json.dumps({"input_ids": row}) + "\n" for row in tokens(4, 64, seed=3).tolist())
    )
    rows = [{"article": f"Article {i} says little. " * 5, "summary_gt": f"Little in {i}."} for i in range(2)]
    (home / "articles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def measure(home, *arguments, data="text.jsonl"):
    """The command's output and the rows that it wrote."""
    out = home / "out.json"
    out.unlink(missing_ok=True)
    given = ("eval", home / "artifact", "--model", home / "model", "--data", home / data, *arguments, "--json", out)
    shown = ok(*given).stdout
    rows = json.loads(out.read_text())
    return shown, rows if isinstance(rows, list) else [rows]


def test_policies_are_rows_below_their_artifact(home):
    shown, rows = measure(home, *TEXT, "--keep", 0.3, "--recent", 0.1, "--policy", "h2o", "--policy", "window")
    assert [row["policy"] for row in rows] == [None, "h2o", "window"]
    plain, h2o, window = rows
    assert "h2o 30 %" in shown
    assert "the first 48 tokens of each sequence are a prompt" in shown
    assert (plain["kept"], h2o["kept"], window["kept"]) == (64, 19, 19)
    assert (h2o["eviction"]["keep"], h2o["eviction"]["recent"]) == (0.3, 0.1)
    assert h2o["cache_bytes"] < plain["cache_bytes"] / 2
    assert h2o["kld"] > plain["kld"]
    assert h2o["overlap"] > window["overlap"]
    assert len(plain["sequence_nll"]) == 3


def test_the_prompt_and_the_passes_can_be_chosen(home):
    shown, (row,) = measure(home, *TEXT, "--prompt", 0.5, "--step", 4)
    assert (row["prompt"], row["step"], row["tokens"], row["policy"]) == (32, 4, 96, None)
    assert "tokens in passes" not in shown
    assert "in passes of 4 tokens" in shown


def test_what_is_told_of_eviction_reaches_the_cache(home):
    _, (_, streaming, full) = measure(
        home, *TEXT, "--keep", 24, "--recent", 8, "--policy", "h2o", "--policy", "full", "--streaming", "--per", "layer"
    )
    assert streaming["eviction"]["streaming"] is True
    assert (streaming["eviction"]["per"], streaming["eviction"]["recent"]) == ("layer", 8)
    assert streaming["kept"] <= 24
    assert full["kept"] == 64


def test_age_norm_is_for_qhitter(home):
    refused(2, "--no-age-norm is for the policy qhitter", "eval", home / "artifact", "--keep", 0.3, "--policy", "h2o",
            "--no-age-norm")  # fmt: skip


def test_summaries(home):
    shown, rows = measure(home, "--task", "summaries", "--keep", 0.5, "--policy", "window", data="articles.jsonl")
    assert [(row["artifact"] is None, row["policy"]) for row in rows] == [
        (True, None),
        (False, None),
        (False, "window"),
    ]
    assert all(len(row["summaries"]) == 2 for row in rows)
    assert "ROUGE-L" in shown
    assert "2 articles" in shown
    refused(2, r"text\.jsonl:1: field 'article' is missing", "eval", home / "artifact", "--model", home / "model",
            "--task", "summaries", "--data", home / "text.jsonl")  # fmt: skip


def test_passkey(home):
    arguments = ("--task", "passkey", "--samples", 2, "--seq-len", 320, "--keep", 0.3, "--policy", "h2o", "--seed", 3)
    shown, rows = measure(home, *arguments)
    assert [row["policy"] for row in rows] == [None, None, "h2o"]
    assert {cell["length"] for cell in rows[0]["cells"]} == {80, 160, 320}
    assert len(rows[0]["cells"]) == 6
    assert "score" in shown  # "score at" may be broken by a narrow column
    assert "seed 3" in shown
    assert measure(home, *arguments)[1][2]["score"] == rows[2]["score"]
    refused(2, "length is 10 tokens, a pass key with its question takes", "eval", home / "artifact", "--model",
            home / "model", "--task", "passkey", "--seq-len", 40)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "h2o"), "--policy h2o needs a budget; give --keep"),
        (("--streaming",), "--streaming is for eviction; give --keep"),
        (("--recent", 0.1), "--recent is 0.1, a share of tokens never evicted; give --keep"),
        (("--recent", 2.5), "--recent is 2.5: .*a share below 1 or a whole number of tokens"),
        (("--keep", 0.2, "--policy", "lru"), "policy is 'lru', expected one of full, window, h2o"),
        (("--keep", 0), "--keep is 0.0"),
        (("--keep", 0.8, "--recent", 0.4), "keep is 0.8 and recent 0.4, together 1.2, expected at most 1"),
        (("--keep", 0.2, "--per", "row"), "--per is 'row'"),
        (("--keep", 0.2, "--step", 17), "--step is 17, expected at most 16"),
        (("--keep", 0.2, "--adaptive", "x"), "x: no adaptive widths there"),
        (("--task", "passkey", "--adaptive", "x"), "x: no adaptive widths there"),
        (("--prompt", 1.0), "--prompt is 1.0"),
        (("--task", "sums"), "--task is 'sums', expected one of text, summaries, passkey"),
        (("--keep", 0.01, "--policy", "h2o"), "--keep is 0.01, of 512 tokens that is 5, expected at least 8.*smallest"),
    ],
)  # fmt: skip
def test_bad_options(home, arguments, message):
    refused(2, message, "eval", home / "artifact", "--model", home / "model", "--data", home / "text.jsonl", *TEXT,
            *arguments)  # fmt: skip
