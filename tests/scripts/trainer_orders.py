"""Says, for several orders of imports, whether classes of Trainers are ours under the runner."""

import os
import sys

from lightning_mics import run
from lightning_mics.accelerate.trainer import TrainerMethods


def loaded_before():
    from transformers import Seq2SeqTrainer

    class Mine(Seq2SeqTrainer):
        pass

    run._take_over_trainers()
    from transformers import Trainer

    return Seq2SeqTrainer, Mine, Trainer, type("Later", (Trainer,), {})


def subclass_first():
    run._take_over_trainers()
    from transformers import Seq2SeqTrainer, Trainer

    return Seq2SeqTrainer, Trainer


def module_first():
    run._take_over_trainers()
    from transformers.trainer import Trainer

    class Mine(Trainer):
        pass

    from transformers.trainer_seq2seq import Seq2SeqTrainer

    return Mine, Trainer, Seq2SeqTrainer


def ours_first():
    run._take_over_trainers()
    from transformers import Seq2SeqTrainer

    from lightning_mics.transformers import MiCSSeq2SeqTrainer, MiCSTrainer

    return MiCSTrainer, MiCSSeq2SeqTrainer, Seq2SeqTrainer


for order in (loaded_before, subclass_first, module_first, ours_first):
    child = os.fork()
    if child == 0:
        print(order.__name__, *(issubclass(cls, TrainerMethods) for cls in order()), flush=True)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        sys.exit(f"{order.__name__} failed")
