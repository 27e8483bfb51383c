"""What stands between click and the shells that complete `tpctl`: scripts, and how they cut the line into words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete, add_completion_class

from tpctl.config.options import OPTIONS

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

VARIABLE = "_TPCTL_COMPLETE"
"""Set by the scripts: which shell asks. click's own choice of name, by the name of the command."""
_BARE = frozenset(option.flag for option in OPTIONS if option.is_bool)


def joined(words: list[str]) -> list[str]:
    """Words of a line, with those put together again that bash has cut at an equals sign.

    >>> joined(["install", "--engine", "=", "nftables", "--wait", "="])
    ['install', '--engine=nftables', '--wait=']
    """
    found: list[str] = []
    for word in words:
        is_value = found and found[-1].startswith("--") and found[-1].endswith("=")
        if found and (is_value or (word == "=" and found[-1].startswith("--") and "=" not in found[-1])):
            found[-1] += word
        else:
            found.append(word)
    return found


class _Words(ShellComplete):
    """Completion that knows flags which may stand alone, and values behind an equals sign."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """What fits. A shell that has not cut the word at its equals sign gets the whole word back."""
        from click.shell_completion import CompletionItem

        before = joined(args)
        behind_equals = incomplete == "=" or (before and before[-1].startswith("--") and before[-1].endswith("="))
        last = [before.pop().removesuffix("=")] if before and behind_equals else []
        before = [f"{word}=true" if word in _BARE else word for word in before]
        found = super().get_completions(before + last, incomplete)
        flag, equals, _ = incomplete.partition("=")
        if not equals or not flag.startswith("--"):
            return found
        whole = f"{flag}={{}}" if found and found[0].type == "plain" else "{}"
        return [CompletionItem(whole.format(item.value), item.type, item.help) for item in found]


class _Bash(_Words, BashComplete):
    pass


class _Zsh(_Words, ZshComplete):
    pass


class _Fish(_Words, FishComplete):
    pass


SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}


def register() -> None:
    """Let click answer the scripts with these."""
    for name, shell in SHELLS.items():
        add_completion_class(shell, name)


def script(shell: str, command: click.Command, name: str) -> str:
    """What the shell reads."""
    return ShellComplete.source(SHELLS[shell](command, {}, name, VARIABLE)).strip() + "\n"
