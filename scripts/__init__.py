import signal
import sys

import nanochat  # noqa: F401  first: what is set there comes before PyTorch is loaded

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while PyTorch is loaded ends quietly; `run_script` takes over then
