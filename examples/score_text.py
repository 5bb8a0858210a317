"""Scores of generated text by the libraries that papers use: ``rouge_score`` and ``sacrebleu``.

    pip install "qkern[train,eval]"
    python examples/score_text.py                    # the examples of both papers
    python examples/score_text.py answers.jsonl
    python examples/score_text.py questions.jsonl --model MODEL_DIR --adapter my-adapter

Rows of answers are {"generated": ..., "reference": ...}, those of questions {"prompt": ...,
"reference": ...}, or "references" with a list. Questions are answered first, greedily, by the 4-bit
model that the adapter was trained over.

BLEU: Papineni et al., https://aclanthology.org/P02-1040; ROUGE: Lin,
https://aclanthology.org/W04-1013. BLEU is in per cent, of the whole corpus; ROUGE is the mean F1 of
the rows, 0 to 1, against the best reference of each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

ROUGE = ("rouge1", "rouge2", "rougeL")

# Section 2.1 of the paper on BLEU: candidates of example 1 and their references, and example 2.
GUIDE = (
    "It is a guide to action which ensures that the military always obeys the commands of the"
    " party",
    "It is to insure the troops forever hearing the activity guidebook that party direct",
)
GUIDE_REFERENCES = (
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the"
    " command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
)
THE = "the the the the the the the"
CAT = ("The cat is on the mat", "There is a cat on the mat")

# Section 3.1 of the paper on ROUGE: a reference, and candidates.
POLICE = "police killed the gunman"
GUNMAN = ("police kill the gunman", "the gunman kill police", "the gunman police killed")


def bleu(generated: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU of a corpus, without regard to case, and the parts that it is made of.

    Args:
        generated: a text for each row.
        references: one or more for each row.

    Returns:
        ``bleu`` in per cent, ``brevity`` (the penalty), ``precision1`` to ``precision4`` as shares.
    """
    most = max(map(len, references))
    # sacrebleu takes a corpus for each place; None where a row has fewer references.
    by_place = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    found = BLEU(lowercase=True, smooth_method="none").corpus_score(list(generated), by_place)
    shares = {f"precision{i + 1}": value / 100 for i, value in enumerate(found.precisions)}
    return {"bleu": found.score, "brevity": found.bp, **shares}


def rouge(generated: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, without stemming.

    Args:
        generated: a text for each row.
        references: one or more for each row; the best one counts.
    """
    scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=False)
    rows = [
        scorer.score_multi(list(these), text)
        for text, these in zip(generated, references, strict=True)
    ]
    return {name: sum(row[name].fmeasure for row in rows) / len(rows) for name in ROUGE}


def answer(prompts: Sequence[str], model: str, adapter: str | None, tokens: int) -> list[str]:
    """What a model writes, greedily; quantized as the adapter says, else as its files are."""
    from qkern.integrations.pretrained import load_tokenizer
    from qkern.training.base import load_finetuned
    from qkern.training.generate import generate
    from qkern.training.libraries import quiet_libraries

    quiet_libraries()
    net, tokenizer = load_finetuned(model, adapter), load_tokenizer(model)
    return [generate(net, tokenizer, p, max_new_tokens=tokens).text for p in prompts]


def papers() -> dict[str, float]:
    """The scores that the two papers give for their own examples."""
    guides = [bleu([text], [GUIDE_REFERENCES]) for text in GUIDE]
    police = [rouge([text], [[POLICE]]) for text in GUNMAN]
    return {
        "BLEU, candidate 1, unigrams (17/18)": guides[0]["precision1"],
        "BLEU, candidate 1, bigrams (10/17)": guides[0]["precision2"],
        "BLEU, candidate 2, unigrams (8/14)": guides[1]["precision1"],
        "BLEU, candidate 2, bigrams (1/13)": guides[1]["precision2"],
        "BLEU, seven times 'the', unigrams (2/7)": bleu([THE], [CAT])["precision1"],
        "ROUGE-L, police kill the gunman (3/4)": police[0]["rougeL"],
        "ROUGE-L, the gunman kill police (2/4)": police[1]["rougeL"],
        "ROUGE-L, the gunman police killed (2/4)": police[2]["rougeL"],
        "ROUGE-2, the gunman kill police (1/3)": police[1]["rouge2"],
        "ROUGE-2, the gunman police killed (2/3)": police[2]["rouge2"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print scores as lines; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "rows", nargs="?", type=Path, help="a JSONL file; the papers' texts if none"
    )
    parser.add_argument("--model", help="a model directory, to answer the rows' prompts")
    parser.add_argument("--adapter", help="what qkern finetune or PEFT wrote")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args(arguments)
    if args.rows is None:
        scores = papers()
    else:
        lines = args.rows.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        references = [row.get("references") or [row["reference"]] for row in rows]
        if args.model is None:
            generated = [row["generated"] for row in rows]
        else:
            prompts = [row["prompt"] for row in rows]
            generated = answer(prompts, args.model, args.adapter, args.max_new_tokens)
        scores = {**bleu(generated, references), **rouge(generated, references)}
    for name, value in scores.items():
        print(f"{name}: {value:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
