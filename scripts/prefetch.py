"""Download everything that a machine without a network needs; run it where there is one, on the same base directory.

python -m scripts.prefetch -n 170
HF_HUB_OFFLINE=1 bash runs/speedrun.sh
"""

import time

from nanochat import hub
from nanochat.common import Parser, UserError, get_base_dir, integer, run_script
from nanochat.core_eval import bundle_dir
from nanochat.dataset import CLIMBMIX_LAST, download_climbmix
from tasks.common import load_hub_dataset
from tasks.registry import HUB_SPLITS
from tasks.spellingbee import WORDS_URL


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--num-shards", type=integer(0, CLIMBMIX_LAST, off=-1), default=170,
                        help="training shards of ClimbMix, about 90 MB each; -1 all")
    args = parser.parse_args(argv)
    if hub.is_offline():
        raise UserError("HF_HUB_OFFLINE is set: unset it to download")
    items = [("ClimbMix", lambda: download_climbmix(args.num_shards)),
             ("word list", lambda: hub.download(WORDS_URL, get_base_dir() / "words_alpha.txt")),
             ("CORE bundle", bundle_dir)]
    items += [(f"{repo} ({subset}, {split})", lambda wanted=(repo, subset, split): load_hub_dataset(*wanted))
              for repo, subset, split in HUB_SPLITS]
    failures = []
    for name, fetch in items:
        start = time.perf_counter()
        try:
            fetch()
            print(f"OK    {name:<50}{time.perf_counter() - start:>7.1f} s", flush=True)
        except UserError as error:
            failures.append(name)
            print(f"FAIL  {name}: {error}", flush=True)
    if failures:
        raise UserError(f"{len(failures)} of {len(items)} could not be had ({', '.join(failures)}); run the command again to go "
                        "on")
    print(f"all is in {get_base_dir()} and in the datasets library's cache (HF_HOME); HF_HUB_OFFLINE=1 now needs no network")
    return {"items": len(items)}


if __name__ == "__main__":
    run_script(main)
