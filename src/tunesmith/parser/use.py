"""Commands that use a trained model, and those around it."""

from __future__ import annotations

from tunesmith.config.choices import (
    ANSWER_CHOICES,
    BLEU_TOKENIZERS,
    EXPORT_FORMATS,
    GGUF_DIFFERENCES,
    GGUF_TYPES,
    KEEP_CHOICES,
    MERGE_METHODS,
    MINIMIND_GENERATIONS,
    PUSH_PARTS,
    REPLY_CHOICES,
    WEIGHT_GENERATIONS,
)
from tunesmith.parser.command import CommandParser, Commands, add_command
from tunesmith.parser.config_flags import add_data_flags, add_prompt_flags
from tunesmith.parser.values import (
    as_count,
    as_name,
    as_part,
    as_path,
    as_penalty,
    as_port,
    as_positive,
    as_seconds,
    as_seed,
    as_share,
    as_temperature,
    as_weight,
    one_of,
)


def add_use_commands(commands: Commands) -> None:
    """Commands that use a trained model."""
    chat = add_command(commands, "chat", "talk to a model or a finished run")
    chat.add_argument("model", type=as_name, metavar="MODEL_OR_RUN", help="folder of a run or model, or a hub id")
    chat.add_argument(
        "more", metavar="ADAPTER", nargs="*", default=[], help="more adapters of the same base, to switch between"
    )
    chat.add_argument("--tokenizer", type=as_name, metavar="T", help="folder or hub id; a .pth has none of its own")
    _add_free_config(chat)
    chat.add_argument("--prompt", metavar="TEXT", help="answer one prompt and exit")
    chat.add_argument("--system", metavar="TEXT", help="system prompt")
    chat.add_argument(
        "--max-new-tokens", type=as_positive, default=512, metavar="N", help="longest reply (default: 512)"
    )
    chat.add_argument("--temperature", type=as_temperature, metavar="T", help="0: greedy; default: the model's own")
    _add_sampling(chat)
    chat.add_argument("--seed", type=as_seed, default=0, metavar="N", help="seed of sampling (default: 0)")
    chat.add_argument(
        "--chat-template", metavar="T", help="a .jinja file, chatml, alpaca or none; default: the model's"
    )
    chat.add_argument("--trust-remote-code", action="store_true", help="run Python code in the model's folder")
    chat.add_argument("--allow-changed-base", action="store_true", help="open an adapter although its base has changed")
    _add_evaluate(commands)
    _add_generate(commands)
    _add_serve(commands)
    merge = add_command(commands, "merge", "merge adapters into their base model and verify the result")
    merge.add_argument(
        "adapters", type=as_name, nargs="+", metavar="ADAPTER", help="PEFT folders, or runs that trained an adapter"
    )
    merge.add_argument("--output", required=True, type=as_name, metavar="DIR", help="folder to create")
    merge.add_argument(
        "--method", type=one_of(MERGE_METHODS), default="sequential", metavar="METHOD",
        help=f"how to combine several adapters: {', '.join(MERGE_METHODS)} (default: sequential)",
    )  # fmt: skip
    merge.add_argument("--weights", nargs="+", type=as_weight, metavar="X", help="weight of each adapter (default: 1)")
    merge.add_argument(
        "--density",
        type=as_share,
        default=0.5,
        metavar="X",
        help="share of values that ties, dare and prune keep (default: 0.5)",
    )
    merge.add_argument("--seed", type=as_seed, default=0, metavar="N", help="seed of dare's choice (default: 0)")
    merge.add_argument("--base", type=as_name, metavar="M", help="the base model in full precision, if it has moved")
    merge.add_argument(
        "--allow-changed-base", action="store_true", help="merge although the base has changed since training"
    )
    merge.add_argument("--trust-remote-code", action="store_true", help="run Python code in the base's folder")
    _add_export(commands)
    _add_push(commands)
    report = add_command(commands, "report", "write RUN/report.html again: verdict, curves, data, replies, config")
    report.add_argument("run", type=as_name, metavar="RUN", help="folder of the run (train --output), finished or not")
    add_command(commands, "recipes", "list the run files of the package, for train recipe:NAME")
    _add_convert_config(commands)
    demo = add_command(commands, "demo", "fine-tune the small model of the package in a few minutes and test it")
    demo.add_argument(
        "--output", type=as_name, default="runs/demo", metavar="RUN", help="folder to create (default: runs/demo)"
    )


def _add_sampling(parser: CommandParser) -> None:
    """Settings that default to those of the model's generation_config.json."""
    for flag, kind, letter, text in (
        ("--top-p", as_share, "P", "draw from the likeliest tokens that have this probability together"),
        ("--top-k", as_count, "K", "draw from the K likeliest tokens; 0: from all"),
        ("--min-p", as_part, "P", "leave out tokens less likely than this share of the likeliest"),
        ("--repetition-penalty", as_penalty, "X", "above 1: fewer repetitions"),
    ):
        parser.add_argument(flag, type=kind, metavar=letter, help=f"{text} (default: the model's own)")


def _add_convert_config(commands: Commands) -> None:
    summary = "convert a TRL, LLaMA-Factory or Axolotl YAML, or a MiniMind command, to a run file"
    convert = add_command(commands, "convert-config", summary)
    convert.add_argument("file", type=as_path, nargs="?", metavar="FILE", help="the YAML to convert")
    convert.add_argument(
        "--from", dest="source", type=one_of(("minimind",)), metavar="minimind", help="convert the command after --"
    )
    convert.add_argument(
        "--generation", type=one_of(MINIMIND_GENERATIONS), metavar="G",
        help=f"generation of MiniMind's scripts: {', '.join(MINIMIND_GENERATIONS)} (default: the newest that has all "
        "flags of the command)",
    )  # fmt: skip
    convert.add_argument(
        "--output", type=as_path, metavar="FILE", help="run file to write (default: to standard output)"
    )
    convert.add_argument(
        "--dataset-info", type=as_path, metavar="DIR", help="folder with LLaMA-Factory's dataset_info.json"
    )


def _add_evaluate(commands: Commands) -> None:
    evaluate = add_command(commands, "evaluate", "score models on data: by likelihood, and by the replies they write")
    evaluate.add_argument(
        "models", type=as_name, nargs="+", metavar="MODEL_OR_RUN", help="runs, model folders, adapters or hub ids"
    )
    evaluate.add_argument("--base", action="store_true", help="put the base of each run or adapter beside it")
    evaluate.add_argument(
        "--limit", type=as_positive, metavar="N", help="score only N rows, drawn by the seed (default: all)"
    )
    evaluate.add_argument(
        "--replies", type=one_of(REPLY_CHOICES), default="all", metavar="|".join(REPLY_CHOICES),
        help="replies to generate: to all trained turns, the last of each row, or none: likelihoods only "
        "(default: all)",
    )  # fmt: skip
    evaluate.add_argument(
        "--max-new-tokens", type=as_positive, default=512, metavar="N", help="longest reply (default: 512)"
    )
    evaluate.add_argument(
        "--temperature", type=as_temperature, default=0.0, metavar="T", help="of sampling (default: 0, greedy)"
    )
    evaluate.add_argument(
        "--seed", type=as_seed, default=0, metavar="N", help="of --limit, sampling and intervals (default: 0)"
    )
    evaluate.add_argument(
        "--bleu-tokenizer", type=one_of(BLEU_TOKENIZERS), default="auto", metavar="T",
        help=f"sacrebleu's: {', '.join(BLEU_TOKENIZERS)} (default: by the script of the references)",
    )  # fmt: skip
    evaluate.add_argument(
        "--output", type=as_path, metavar="DIR", help="folder to write (default: RUN/evaluate, or evaluate/NAME)"
    )
    evaluate.add_argument(
        "--overwrite", action="store_true", help="replace another evaluation in the folder; the same one is continued"
    )
    evaluate.add_argument("--json", action="store_true", help="print evaluate.json instead of a table")
    evaluate.add_argument(
        "--judge", type=as_name, metavar="URL",
        help="an OpenAI-compatible server whose model compares the replies of two models, or of one with the data",
    )  # fmt: skip
    evaluate.add_argument("--judge-model", type=as_name, metavar="M", help="the model's name there")
    evaluate.add_argument(
        "--judge-key-env", type=as_name, metavar="NAME",
        help="environment variable with its API key (default: OPENAI_API_KEY, for api.openai.com only)",
    )  # fmt: skip
    evaluate.add_argument(
        "--judge-parallel", type=as_positive, default=4, metavar="N", help="questions to it at once (default: 4)"
    )
    evaluate.add_argument(
        "--judge-timeout", type=as_seconds, default=120.0, metavar="S", help="seconds for one answer (default: 120)"
    )
    evaluate.add_argument("--tokenizer", type=as_name, metavar="T", help="folder or hub id; a .pth has none of its own")
    _add_free_config(evaluate)
    evaluate.add_argument("--trust-remote-code", action="store_true", help="run Python code in the models' folders")
    evaluate.add_argument(
        "--allow-changed-base", action="store_true", help="open an adapter although its base has changed"
    )
    add_data_flags(evaluate)


def _add_generate(commands: Commands) -> None:
    generate = add_command(commands, "generate", "let a model answer prompts, and keep the answers as data for train")
    generate.add_argument(
        "model", type=as_name, metavar="MODEL_OR_RUN", help="a run, model folder, adapter or hub id that answers"
    )
    generate.add_argument("--output", required=True, type=as_path, metavar="FILE", help="the .jsonl to write")
    generate.add_argument(
        "--samples", type=as_positive, default=1, metavar="N", help="answers drawn for each prompt (default: 1)"
    )
    generate.add_argument(
        "--replies", type=one_of(ANSWER_CHOICES), default="last", metavar="|".join(ANSWER_CHOICES),
        help="which replies of a row to answer anew: its last, or each in a row of its own (default: last)",
    )  # fmt: skip
    generate.add_argument("--limit", type=as_positive, metavar="N", help="answer only N rows, drawn by the seed")
    generate.add_argument("--system", metavar="TEXT", help="system prompt for rows that have none")
    generate.add_argument(
        "--max-new-tokens", type=as_positive, default=512, metavar="N", help="longest answer (default: 512)"
    )
    generate.add_argument(
        "--temperature", type=as_temperature, metavar="T",
        help="0: greedy (default: 0 for one sample, 1 for several)",
    )  # fmt: skip
    _add_sampling(generate)
    generate.add_argument(
        "--stop", nargs="+", action="extend", default=[], metavar="TEXT", help="texts that end an answer"
    )
    generate.add_argument(
        "--seed", type=as_seed, default=0, metavar="N", help="of --limit and of sampling (default: 0)"
    )
    generate.add_argument(
        "--max-rows", type=as_positive, default=64, metavar="N", help="answers generated at once (default: 64)"
    )
    _add_selection(generate)
    generate.add_argument("--overwrite", action="store_true", help="start again if the output holds other answers")
    generate.add_argument("--tokenizer", type=as_name, metavar="T", help="folder or hub id; a .pth has none of its own")
    _add_free_config(generate)
    generate.add_argument("--trust-remote-code", action="store_true", help="run Python code in the model's folder")
    generate.add_argument(
        "--allow-changed-base", action="store_true", help="open an adapter although its base has changed"
    )
    add_prompt_flags(generate)


def _add_selection(generate: CommandParser) -> None:
    group = generate.add_section("which answers are kept (may change later without generating anew)")
    group.add_argument(
        "--keep", type=one_of(KEEP_CHOICES), default="all", metavar="|".join(KEEP_CHOICES),
        help="all, those that pass --check, or the best of each row by --score (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--check", nargs="+", action="extend", default=[], type=as_name, metavar="CHECK",
        help="what is correct: a score of evaluate (exact_match, json_equal, tool_equal, ...), number (the last number "
        "is the reference's), regex=PATTERN, json_schema=FILE (default: reference: equals it, by its kind)",
    )  # fmt: skip
    group.add_argument(
        "--score", type=as_name, metavar="SCORE",
        help="what samples of a row are ranked by: logprob, or a score of evaluate (default with --keep best: rougeL, "
        "or logprob without a reference)",
    )  # fmt: skip
    group.add_argument(
        "--keep-per-row", type=as_positive, metavar="K", help="at most K answers of a row (default: 1 with --keep best)"
    )
    group.add_argument(
        "--keep-cut", action="store_true", help="also answers that were cut off, which teach a model to end too early"
    )
    group.add_argument("--rejected", type=as_path, metavar="FILE", help="write the others here, each with the reason")


def _add_export(commands: Commands) -> None:
    export = add_command(commands, "export", "write a model in another tool's files, read back and compared")
    export.add_argument("model", type=as_name, metavar="MODEL", help="a RUN, model folder, hub id, adapter or .pth")
    export.add_argument("--output", type=as_name, metavar="DIR", help="folder to create; for gguf: FILE.gguf")
    export.add_argument(
        "--format", type=one_of(EXPORT_FORMATS), metavar="FORMAT",
        help="gguf (for llama.cpp and Ollama), hf (from a .pth), minimind (a .pth), or minimind-lora (an adapter as "
        "its LoRA .pth)",
    )  # fmt: skip
    export.add_argument(
        "--type", type=one_of(GGUF_TYPES), metavar="TYPE",
        help=f"of a GGUF file's matrices: {', '.join(GGUF_TYPES)} (default: the model's own)",
    )  # fmt: skip
    export.add_argument(
        "--allow", nargs="+", default=[], type=one_of(GGUF_DIFFERENCES), metavar="PART",
        help="write a GGUF file although llama.cpp differs in: tokens (gives other ids for some texts), template "
        "(renders chats otherwise)",
    )  # fmt: skip
    export.add_argument(
        "--verify", action="store_true", help="say whether a GGUF file is unchanged since its export, and proven"
    )
    export.add_argument(
        "--generation", type=one_of(WEIGHT_GENERATIONS), metavar="G",
        help=f"of MiniMind's files: {', '.join(WEIGHT_GENERATIONS)} (default: the newest that the architecture has)",
    )  # fmt: skip
    export.add_argument(
        "--weight", type=as_name, metavar="NAME", help="begin of the file's name (default: full_sft; lora)"
    )
    export.add_argument("--tokenizer", type=as_name, metavar="T", help="folder or hub id; a .pth has none of its own")
    export.add_argument("--base", type=as_name, metavar="M", help="the base of a LoRA .pth")
    _add_free_config(export)
    export.add_argument("--trust-remote-code", action="store_true", help="run Python code in the model's folder")


def _add_push(commands: Commands) -> None:
    push = add_command(commands, "push", "publish a model or adapter on the Hugging Face hub; shows it first")
    push.add_argument("model", type=as_name, metavar="RUN_OR_MODEL", help="a RUN, model folder or adapter")
    push.add_argument("repository", type=as_name, metavar="OWNER/NAME", help="the repository, created if there is none")
    push.add_argument("--yes", action="store_true", help="push; without it, what would be pushed is shown")
    push.add_argument("--public", action="store_true", help="for everybody (default: private)")
    push.add_argument("--replace", action="store_true", help="replace files that the repository has already")
    push.add_argument(
        "--license", type=as_name, metavar="ID", help="the licence, as the hub names it (default: the base's, if known)"
    )
    push.add_argument("--base", type=as_name, metavar="OWNER/NAME", help="where the base is on the hub, if it is local")
    push.add_argument(
        "--include", nargs="+", action="extend", default=[], type=one_of(PUSH_PARTS), metavar="PART",
        help="of a run, also: config (config.yaml), metrics (metrics.jsonl), report (report.html), replies (sample "
        "replies, which quote the data)",
    )  # fmt: skip
    push.add_argument("--trust-remote-code", action="store_true", help="run Python code in the model's folder")


def _add_free_config(parser: CommandParser) -> None:
    parser.add_argument(
        "--model.config.KEY", metavar="VALUE", help="what a .pth does not say, as in num_attention_heads 16"
    )


def _add_serve(commands: Commands) -> None:
    serve = add_command(commands, "serve", "answer over HTTP as OpenAI's API does")
    serve.add_argument("model", type=as_name, metavar="MODEL_OR_RUN", help="folder of a run or model, or a hub id")
    serve.add_argument(
        "more", metavar="ADAPTER", nargs="*", default=[], help="more adapters of the same base; each is a model name"
    )
    serve.add_argument("--name", type=as_name, metavar="NAME", help="the model's name in requests (default: its own)")
    serve.add_argument("--base", action="store_true", help="also the model that a full run began from, as base")
    serve.add_argument("--tokenizer", type=as_name, metavar="T", help="folder or hub id; a .pth has none of its own")
    _add_free_config(serve)
    serve.add_argument(
        "--temperature", type=as_temperature, metavar="T", help="of requests that give none (default: the model's own)"
    )
    _add_sampling(serve)
    serve.add_argument(
        "--chat-template", metavar="T", help="a .jinja file, chatml, alpaca or none; default: the model's"
    )
    serve.add_argument("--trust-remote-code", action="store_true", help="run Python code in the model's folder")
    serve.add_argument(
        "--allow-changed-base", action="store_true", help="open an adapter although its base has changed"
    )
    serve.add_argument(
        "--host", type=as_name, default="127.0.0.1", metavar="H", help="address to listen on (default: 127.0.0.1)"
    )
    serve.add_argument("--port", type=as_port, default=8000, metavar="N", help="0: any free one (default: 8000)")
    serve.add_argument(
        "--api-key-file", type=as_name, metavar="FILE",
        help="file with the key that clients must send; or set TUNESMITH_API_KEY",
    )  # fmt: skip
    serve.add_argument(
        "--allowed-hosts", nargs="+", action="extend", default=[], type=as_name, metavar="NAME",
        help="more names of this server in the Host header, as behind a proxy",
    )  # fmt: skip
    serve.add_argument(
        "--runs", nargs="+", action="extend", type=as_name, metavar="RUN",
        help="runs whose curves and training data the page shows (default: those served, on this machine only)",
    )  # fmt: skip
    for flag, default, text in (
        ("--max-rows", 64, "replies generated at once"),
        ("--max-queue", 256, "replies that wait beyond them; more get status 429"),
        ("--max-new-tokens", 4096, "longest reply"),
        ("--max-body-bytes", 4 * 2**20, "largest request"),
    ):
        serve.add_argument(flag, type=as_positive, default=default, metavar="N", help=f"{text} (default: {default})")
    serve.add_argument(
        "--timeout", type=as_seconds, default=600.0, metavar="S", help="of a reply, in seconds (default: 600)"
    )
    serve.add_argument(
        "--grace", type=as_seconds, default=30.0, metavar="S",
        help="seconds that replies may go on after SIGTERM or Ctrl-C (default: 30)",
    )  # fmt: skip
