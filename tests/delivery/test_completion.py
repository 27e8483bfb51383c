"""Real shells complete the words of `tpctl`, with the script that it prints."""

from __future__ import annotations

import doctest
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tpctl.cli.complete import completing

COMMAND = Path(sys.executable).with_name("tpctl")

# bash cuts words at the characters of COMP_WORDBREAKS before it calls the function: the words here are cut like that.
BASH = """
eval "$(tpctl completion bash)"
function=$(complete -p tpctl | sed 's/.*-F \\([^ ]*\\).*/\\1/')
while IFS=$'\\t' read -r -a COMP_WORDS; do
    [ "${COMP_WORDS[-1]}" = . ] && COMP_WORDS[-1]=
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    "$function" tpctl 2>/dev/null # compopt(1) says that this is no completion
    echo "${COMPREPLY[*]}"
done
"""
ENGINES = "auto nftables iptables ebpf"
LINES = {
    ("tpctl", "inst"): "install",
    ("tpctl", "explain", "."): "dns inbound outbound",
    ("tpctl", "status", "--js"): "--json",
    ("tpctl", "install", "--engine", "."): ENGINES,
    ("tpctl", "install", "--engine", "="): ENGINES,
    ("tpctl", "install", "--engine", "=", "nf"): "nftables",
    ("tpctl", "install", "--iptables-mode", "le"): "legacy",
    ("tpctl", "install", "--redirect-dns", "--kuma-dp-user", "nobod"): "nobody",
    ("tpctl", "install", "--redirect-dns", "=", "."): "true false",
    ("tpctl", "verify", "--exclude-interfaces", "eth7,l"): "eth7,lo",
    ("tpctl", "verify", "--vnet", "lo"): "lo:",
    ("tpctl", "explain", "outbound", "--uid", "root"): "root",
    ("tpctl", "relay", "--user", "nobod"): "nobody",
    ("tpctl", "help", "unin"): "uninstall",
    ("tpctl", "completion", "."): "bash zsh fish",
    ("tpctl", "--color", "=", "n"): "never",
}


def run(shell: str, script: str, stdin: str = "") -> str:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed")
    words = [path, *(["-f"] if shell == "zsh" else []), "-c", script]
    with tempfile.TemporaryDirectory() as home:  # fish makes folders there
        environment = {**os.environ, "PATH": f"{COMMAND.parent}:{os.environ['PATH']}", "HOME": home}
        done = subprocess.run(words, input=stdin, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bash_completes_commands_options_and_values() -> None:
    said = run("bash", BASH, "".join("\t".join(words) + "\n" for words in LINES))
    assert dict(zip(LINES, said.splitlines(), strict=True)) == LINES


def test_fish_completes_commands_options_and_values() -> None:
    lines = ("tpctl unin", "tpctl install --engine nf", "tpctl install --engine=nf", "tpctl relay --user nobod")
    asked = "; ".join(f"complete --do-complete '{line}'" for line in lines)
    said = run("fish", f"tpctl completion fish | source; {asked}").splitlines()
    assert [line.partition("\t")[0] for line in said] == ["uninstall", "nftables", "--engine=nftables", "nobody"]


ZSH = """
autoload -Uz compinit && compinit -u -D
eval "$(tpctl completion zsh)"
print -r -- "$_comps[tpctl]"
_describe() { print -r -- "${(@P)${@[-1]}}" "${(@P)${@[-2]}}" }
compadd() { print -r -- "${@[-1]}" ; for name in $@; do [[ $name == completions* ]] && print -r -- "${(@P)name}"; done }
for line in "tpctl unin" "tpctl install --engine nf" "tpctl install --engine=nf"; do
    words=(${=line}) CURRENT=$#words
    "$_comps[tpctl]"
done
"""


def test_zsh_completes_commands_options_and_values() -> None:
    said = run("zsh", ZSH)
    assert said.startswith("_tpctl_completion\n")
    for word in ("uninstall:remove", "nftables", "--engine=nftables"):
        assert word in said.split(), said


def test_words_that_were_cut_at_equals_signs_are_joined() -> None:
    assert doctest.testmod(completing).failed == 0
