"""Start everything on this machine: brokers, workers, gateway; stop it with Ctrl-C.

examples:
  openlora up                                  the demo model with its adapters
  openlora up --model ./llama --adapters ./loras --workers 2
  openlora up --kafka kafka:9092 --redis redis://:secret@redis:6379/0

Without --kafka or --redis an embedded server runs as a child process. Each subfolder of
--adapters with an adapter_config.json becomes an adapter of that name, also one that appears or
changes later. Ctrl-C drains: no new
work, open streams finish, then all processes end; a second Ctrl-C stops at once.
"""

from __future__ import annotations

import argparse

from openlora import __version__
from openlora.commands.config import add_up_arguments, process_environment, up_config

add_arguments = add_up_arguments


def run(args: argparse.Namespace) -> int:
    """Check, start, supervise until a signal, drain. 0 after an orderly end, 130 after a forced."""
    environ = process_environment()
    config = up_config(args, environ)
    from openlora.commands.checks import check_packages, check_port

    check_packages()
    check_port(config.host, config.port)
    # Only now: these need the packages just checked.
    from openlora.commands.screen import Screen
    from openlora.commands.signals import StopSignals
    from openlora.commands.system import System

    screen = Screen()
    screen.line(f"OpenLoRA {__version__}")
    with StopSignals() as signals:
        system = System(config, environ, screen, signals)
        try:
            system.start()
            signals.hold()
            system.supervisor.run()
        except KeyboardInterrupt:
            pass  # stopped while starting; what was started is stopped below
        finally:
            orderly = system.stop()
    screen.line("Stopped." if orderly else "Stopped at once; what was accepted goes on next time.")
    return 0 if orderly else 130
