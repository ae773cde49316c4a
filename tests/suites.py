"""Invented records and prompts of the published suites, in the layouts that they have."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

from checkpoints import edit_config, talking_model

WORDS = [
    "harbour",
    "ferry",
    "kettle",
    "lantern",
    "clerk",
    "mill",
    "widow",
    "captain",
    "rope",
    "bell",
    "tide",
    "salt",
]
PLACES = ["attic", "bakery", "cellar", "garden", "kitchen", "library"]


def text(n: int, words: int = 40) -> str:
    return " ".join(WORDS[(i * 7 + n * 5 + i // 3) % len(WORDS)] for i in range(words)) + "."


def longbench_record(task: str, n: int) -> dict:
    zh = task == "dureader"
    return {
        "input": "灯塔在哪里\uff1f" if zh else f"Where is the {WORDS[n]}?",
        "context": ("港口的灯塔在北边。" if zh else "") + text(n) + " {context} {0} %s",
        "answers": ["在北边"] if zh else [PLACES[n % 6], f"the {PLACES[n % 6]}"],
        "length": 40,
        "dataset": task,
        "language": "zh" if zh else "en",
        "all_classes": None,
        "_id": f"{n:040d}",
    }


def infinitebench_record(task: str, n: int) -> dict:
    zh = task.endswith("chn")
    return {
        "id": n,
        "context": ("船长的名字叫欧迪勒。" * 3 if zh else text(n, 60)),
        "input": "船长叫什么名字\uff1f" if zh else "Who is the captain?",
        "answer": ["欧迪勒"] if zh else [f"The {WORDS[n]}", WORDS[n]],
        "options": [],
    }


def lveval_record(task: str, n: int) -> dict:
    zh = task.endswith("_zh") or task.startswith(("cmrc", "lic", "dureader", "multifieldqa_zh"))
    keywords = {"answer_keywords": PLACES[n % 6]} if task.startswith(("hotpot", "loogle")) else {}
    return {
        "input": "灯塔在哪里\uff1f" if zh else f"Where is the {WORDS[n]}?",
        "context": ("港口的灯塔在北边。" * 2 if zh else text(n)),
        "answers": ["在港口的北边", "北"] if zh else [f"It is in the {PLACES[n % 6]}."],
        "length": 40,
        "dataset": task,
        "language": "zh" if zh else "en",
        **keywords,
        "confusing_facts": ["It is not there."],
    }


LONGBENCH = ("dureader", "hotpotqa", "musique", "narrativeqa", "qmsum", "triviaqa")
INFINITEBENCH = ("longbook_qa_eng", "longbook_qa_chn")
LVEVAL = (
    *("hotpotwikiqa_mixup", "loogle_SD_mixup", "loogle_CR_mixup", "loogle_MIR_mixup"),
    *("multifieldqa_en_mixup", "multifieldqa_zh_mixup", "factrecall_en", "factrecall_zh"),
    *("cmrc_mixup", "lic_mixup", "dureader_mixup"),
)


def jsonl(records: list[dict]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def files_of(suite: str, n: int = 2) -> dict[str, bytes]:
    """By name, as on the hub; n records of each task."""
    if suite == "longbench":
        members = {
            f"data/{t}.jsonl": jsonl([longbench_record(t, i) for i in range(n)]) for t in LONGBENCH
        }
        return {"data.zip": zipped(**members)}
    if suite == "infinitebench":
        return {
            f"{t}.jsonl": jsonl([infinitebench_record(t, i) for i in range(n)])
            for t in INFINITEBENCH
        }
    return {
        f"{t}.zip": zipped(**{f"{t}/{t}_16k.jsonl": jsonl([lveval_record(t, i) for i in range(n)])})
        for t in LVEVAL
    }


SUITES = ("longbench", "infinitebench", "lveval")
REPOS = {
    "longbench": "zai-org/LongBench",
    "infinitebench": "xinrongzhang2022/InfiniteBench",
    "lveval": "Infinigence/LVEval",
}


def write_prompts(directory: Path) -> Path:
    """Files with the published names and wording of our own."""
    directory.mkdir(exist_ok=True)
    plain = "Read this.\n{context}\nNow say: {input}\nSo:"
    table = {**dict.fromkeys(LONGBENCH, plain), "infinitebench": "A book.\n{context}\n{input}"}
    (directory / "dataset2prompt.json").write_text(json.dumps(table))
    lines = [f"    {name!r}: {plain!r}," for name in LVEVAL]
    code = "import no_such_module\n\nDATASET_PROMPT = {\n" + "\n".join(lines) + "\n}\n"
    (directory / "config.py").write_text(code)
    return directory


def place(path: Path) -> Path:
    """A model, prompts, and the data of each suite in a directory."""
    model = talking_model("qwen2-gdn", path)
    settings = {"repetition_penalty": 1.3, "eos_token_id": list(range(1, 256, 6))}
    (model / "generation_config.json").write_text(json.dumps(settings))
    edit_config(model, eos_token_id=settings["eos_token_id"])
    write_prompts(path / "prompts")
    for suite in SUITES:
        (path / suite).mkdir()
        for name, data in files_of(suite).items():
            (path / suite / name).write_bytes(data)
    return path


def lines(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Predictions by the name of their file."""
    return {
        f.name: [json.loads(x) for x in f.read_text().splitlines()]
        for f in sorted(out.glob("*.jsonl"))
    }
