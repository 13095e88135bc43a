"""`tunesmith push`: a model or adapter in a repository of the hub, shown first, checked before and after."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import replace

from tunesmith import __version__
from tunesmith.display import format_bytes
from tunesmith.errors import RunError, TunesmithError, UsageError
from tunesmith.publish.bundle import Bundle, find_bundle, require_run_finished
from tunesmith.publish.card import join_names
from tunesmith.publish.hub import Hub, Repository, require_name
from tunesmith.publish.plan import Plan, Push, PushSettings, ask_hub, choose_base, count_files, make_plan, show_plan
from tunesmith.report.records import read_run
from tunesmith.terminal.status import show_status

logger = logging.getLogger(__name__)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,59}")


def run_push(settings: PushSettings, can_ask: bool = False) -> Push:
    """Show what would be published, and publish it if that is confirmed.

    Args:
        can_ask: ask on a terminal where nothing was confirmed.

    Raises:
        TunesmithError: it cannot be published as asked; the repository is as it was.
    """
    require_name(settings.repository)
    _refuse_settings(settings)
    bundle = find_bundle(settings.name)
    run = read_run(bundle.run.path) if bundle.run else None
    _require_run(settings, bundle)
    require_run_finished(bundle, settings.name)
    base = choose_base(bundle, run, settings)
    show_status("asking the hub")
    hub = Hub(settings.repository)
    state = ask_hub(hub, settings)
    show_status("reading the weights")
    proof = _check(bundle, settings.trust_remote_code)
    plan = make_plan(settings, hub, state, bundle, run, base, proof)
    asks = can_ask and plan.is_known and not settings.confirmed and sys.stdin.isatty() and sys.stdout.isatty()
    show_plan(plan, with_card=not settings.confirmed)
    if plan.found is not None and not plan.uploaded and not plan.removed:
        logger.info("nothing to push: the repository holds these files already")
        return replace(plan.push, commit=plan.found.commit)
    if not settings.confirmed and not (asks and _says_yes(len(plan.replaced))):
        has_more = bool(plan.replaced and not settings.replaces)
        how = "--replace " * has_more + "--yes" if can_ask else "replace=True, " * has_more + "yes=True"
        level = logging.INFO if can_ask else logging.WARNING
        logger.log(level, f"dry run: nothing was uploaded. To push, run it again with {how}")
        return plan.push
    _require_replace(plan, settings, asks)
    return _upload(plan, hub)


def _refuse_settings(settings: PushSettings) -> None:
    if settings.licence is not None and not _LICENCE.fullmatch(settings.licence):
        raise UsageError(
            f"--license: {settings.licence[:60]!r} is not an id of the hub, as in apache-2.0, mit, cc-by-4.0, gemma, "
            "other.",
            code="licence-id",
        )
    if settings.base is not None:
        owner, slash, _ = settings.base.partition("/")
        require_name(settings.base if slash else f"{owner}/{owner}")  # gpt2 has no owner


def _require_run(settings: PushSettings, bundle: Bundle) -> None:
    if settings.include and bundle.run is None:
        raise UsageError(
            f"--include: {settings.name} is not the folder of a run, so it has no {', '.join(settings.include)}.",
            code="not-a-run",
        )


def _check(bundle: Bundle, trust_remote_code: bool) -> str:
    from tunesmith.publish.verify import check_adapter, check_model

    return check_adapter(bundle.folder) if bundle.is_adapter else check_model(bundle.folder, trust_remote_code)


def _says_yes(replaced: int) -> bool:
    what = f"push, and replace {count_files(replaced)} there?" if replaced else "push?"
    try:
        return input(f"{what} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _require_replace(plan: Plan, settings: PushSettings, was_asked: bool) -> None:
    """Raises:
    TunesmithError: files of the repository would change, and that was not allowed.
    """
    if plan.replaced and not settings.replaces and not was_asked:
        raise TunesmithError(
            f"{settings.repository}: exists, and {len(plan.replaced)} of its files would change: "
            f"{join_names(plan.replaced)}. Add --replace to replace them (its earlier commits keep them), or push to "
            "another name.",
            code="repository-differs",
        )


def _upload(plan: Plan, hub: Hub) -> Push:
    """One commit, compared with the files on this machine afterwards.

    Raises:
        TunesmithError: it failed; the repository has all of the push or nothing.
    """
    files, parent = plan.uploaded, plan.found.commit if plan.found else None
    show_status(f"uploading {format_bytes(sum(file.size for file in files))} to {hub.repository}")
    if plan.found is None:
        hub.create(plan.push.is_private)
        made = hub.look()
        if made is None or made.is_private != plan.push.is_private:
            raise RunError(
                f"{hub.repository}: was created, but is {'public' if plan.push.is_private else 'private'}, as its "
                "owner's settings say. Nothing was uploaded. Change it there, or push to another owner.",
                code="repository-visibility",
            )
        parent = made.commit
    try:
        commit = hub.commit(files, plan.removed, parent, f"Upload with tunesmith {__version__}")
    except TunesmithError as error:
        commit = _find_commit(plan, hub, parent)
        if not commit:
            more = " It was created for this push, and is empty." if plan.found is None else ""
            raise type(error)(f"{error}{more}", code=error.code) from None
    show_status("comparing what was uploaded")
    _require_equal(plan, hub, commit)
    logger.info(
        f"pushed     {plan.push.url}/tree/{commit[:8]}: {count_files(len(files))}; all {len(plan.files)} compared there"
    )
    return replace(plan.push, commit=commit)


def _find_commit(plan: Plan, hub: Hub, parent: str | None) -> str:
    """After an error: the commit, where it was made although its answer was lost."""
    try:
        now = hub.look()
    except TunesmithError:
        return ""
    is_made = now is not None and now.commit not in (None, parent)
    return now.commit or "" if now is not None and is_made and not _find_unequal(plan, now) else ""


def _require_equal(plan: Plan, hub: Hub, commit: str) -> None:
    """Raises:
    RunError: the repository holds other bytes than this machine.
    """
    now = hub.look(commit)
    unequal = _find_unequal(plan, now) if now is not None else ["all files"]
    if unequal:
        raise RunError(
            f"{hub.repository}: after the push, {join_names(unequal)} in commit {commit[:8]} are not the files of this "
            "machine (a .gitignore there leaves files out). Correct that, or delete the commit.",
            code="push-differs",
        )


def _find_unequal(plan: Plan, now: Repository) -> list[str]:
    wrong = [file.name for file in plan.files if file.name not in now.files or not now.files[file.name].equals(file)]
    return wrong + [name for name in plan.removed if name in now.files]
