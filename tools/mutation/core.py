"""The list: faults in the objective, the sampling order, the optimizer, the checkpoints, the network and the step."""

from mutation.diffusion import DIFFUSION
from mutation.mutant import Mutant
from mutation.network import NETWORK
from mutation.state import STATE
from mutation.training import TRAINING

MUTANTS: tuple[Mutant, ...] = DIFFUSION + STATE + TRAINING + NETWORK
