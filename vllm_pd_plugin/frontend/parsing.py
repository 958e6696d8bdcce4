"""The parser of ``vllm-pd serve`` and ``vllm-pd up``: vLLM's own, with a frontend's options and a
help that is about these."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_pd_plugin.compat import moved
from vllm_pd_plugin.frontend.options import GROUP_PREFIX, add_frontend_options

_MORE = """\
Options of `vllm serve` count, too: --host (here 127.0.0.1), --port (8000), --api-key, --dtype and
so on; --config FILE reads options of either kind from YAML. --help=all shows all of them, and
--help=WORD those with the word in their name."""
_WIDTH, _INDENT = 100, 34


class FrontendParser(FlexibleArgumentParser):
    """Shows, where no more is asked for, what vLLM does not have."""

    def format_help(self) -> str:
        if self._search_keyword is not None:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, (), ())
        formatter.add_text(self.description)
        for group in self._action_groups:
            if (group.title or "").startswith(GROUP_PREFIX):
                formatter.start_section(group.title)
                formatter.add_arguments(group._group_actions)
                formatter.end_section()
        formatter.add_text(_MORE)
        return formatter.format_help()


def make_parser(
    prog: str, usage: str, description: str, add_own_options: Callable[[Any], None]
) -> tuple[FrontendParser, set[str]]:
    """Return a parser of vLLM's options and a frontend's, and the options vLLM does not have.

    usage: what follows the command.
    """
    formatter = partial(
        argparse.RawDescriptionHelpFormatter, width=_WIDTH, max_help_position=_INDENT
    )
    parser = moved("make_arg_parser")(
        FrontendParser(
            prog=prog,
            usage=f"{prog} {usage}",
            description=description,
            formatter_class=formatter,
        )
    )
    theirs = set(parser._option_string_actions)
    add_own_options(parser)
    add_frontend_options(parser)
    own = set(parser._option_string_actions) - theirs
    parser.set_defaults(host="127.0.0.1", shutdown_timeout=30, model=None)
    return parser, own
