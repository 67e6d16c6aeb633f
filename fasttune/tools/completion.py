"""Completion of commands, options, settings (`train.le<TAB>`), their values, and names of ready configs.

    eval "$(fasttune completion bash)"          # in ~/.bashrc; zsh alike, in ~/.zshrc behind compinit
    fasttune completion fish | source           # in ~/.config/fish/config.fish

The shell asks the very fasttune that is on its command line, `fasttune completion words WORD…`, for what the last word
may become; where nothing is printed it completes files. Nothing heavy is imported: settings are read from the schema
file beside the ready configs.
"""

import argparse

from fasttune.tools import ready

OPTIONS_OF_VERIFY = ["--gpus", "--json", "--online", "--quick"]  # its parser is its own; a test compares
# Bash cuts words at = and : (COMP_WORDBREAKS): what stands before the last of them is there already.
BASH = r"""# bash: put  eval "$(fasttune completion bash)"  into ~/.bashrc
_fasttune() {
    local typed="${COMP_LINE:0:COMP_POINT}" cut="" breaks word words
    read -ra words <<<"$typed"
    [[ $typed == *[[:space:]] ]] && words+=("")
    word="${words[-1]}"
    breaks="${COMP_WORDBREAKS//[^=:]/}"
    [[ -n $breaks ]] && cut="${word%"${word##*["$breaks"]}"}"
    mapfile -t COMPREPLY < <("${words[0]/#\~/$HOME}" completion words "${words[@]:1}" 2>/dev/null)
    COMPREPLY=("${COMPREPLY[@]#"$cut"}")
    [[ ${#COMPREPLY[@]} -gt 0 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o default -F _fasttune fasttune
"""
ZSH = r"""# zsh: put  eval "$(fasttune completion zsh)"  into ~/.zshrc, behind compinit
_fasttune() {
    local -a found
    found=("${(@f)$("${words[1]/#\~/$HOME}" completion words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -z "$found[1]" ]]; then
        compset -P '*='
        _files
    else
        compadd -S '' -- ${(M)found:#*=}
        compadd -- ${found:#*=}
    fi
}
compdef _fasttune fasttune
"""
FISH = r"""# fish: put  fasttune completion fish | source  into ~/.config/fish/config.fish
function __fasttune_words
    set -l words (commandline -opc) (commandline -ct)
    set -l found ($words[1] completion words $words[2..-1] 2>/dev/null)
    if test -n "$found"
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c fasttune -f -a '(__fasttune_words)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def main(arguments: list[str], parser: argparse.ArgumentParser) -> int:
    """Print the script of a shell, or with `words` what the last of them may become; `parser`: that of fasttune."""
    if arguments[:1] == ["words"]:
        print("".join(f"{word}\n" for word in candidates(arguments[1:], parser)), end="")
        return 0
    description = "Print what makes a shell complete fasttune; the first line says where to put it."
    own = type(parser)(prog="fasttune completion", description=description)
    own.add_argument("shell", choices=list(SCRIPTS))
    print(SCRIPTS[own.parse_args(arguments).shell], end="")
    return 0


def candidates(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """What the last word may become, sorted; empty where it may be anything, or a file."""
    *before, word = words or [""]
    commands = _commands(parser)
    if not before:
        found = ["--help", "--version"] if word.startswith("-") else list(commands)
    elif before[0] not in commands:
        found = []
    else:
        found = _of_command(before[0], commands[before[0]], before[1:], word)
    return sorted(text for text in found if text.startswith(word) and text != word)


def _of_command(name: str, command: argparse.ArgumentParser, before: list[str], word: str) -> list[str]:
    options = {flag: action for action in command._actions for flag in action.option_strings if flag.startswith("--")}
    asked = options.get(before[-1]) if before else None
    if asked is not None and asked.nargs != 0:  # the value of an option
        return list(map(str, asked.choices or []))
    flag, sign, _ = word.partition("=")
    if sign and flag in options:
        return [f"{flag}={value}" for value in options[flag].choices or []]
    if word.startswith("-"):
        return [*options, *(OPTIONS_OF_VERIFY if name == "verify" else [])]
    if name == "completion":
        return list(SCRIPTS)
    if name == "init":  # takes one name
        names = [path.stem for path in ready.paths()]
        return [] if set(before) & set(names) else names
    takes_settings = any(action.dest == "config" for action in command._actions)
    return _settings(word) if takes_settings and before else []


def _settings(word: str) -> list[str]:
    """`key=` of every setting, or `key=value` for those whose values are words."""
    try:
        made = ready.read_schema()
    except (OSError, ValueError):
        return []
    key, sign, _ = word.partition("=")
    if not sign:
        return [f"{key}=" for key in ready.keys(made)]
    try:
        return [f"{key}={value}" for value in ready.choices(ready.setting(made, key))]
    except KeyError:
        return []


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (made,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(made.choices)
