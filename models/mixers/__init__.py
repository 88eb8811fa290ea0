"""How tokens exchange information: the mixers by the word of model.mixer.

To add one, write NAME.py (its keys and costs, without torch) and NAME_module.py (its module), and
a line here. FLOPs, parameter counts, memory, plans, muP and the choice of modules call the methods
of the part; nothing else in the project knows it.
"""

from forescale.models.mixers.attention import Attention
from forescale.models.mixers.gated_deltanet import GatedDeltaNet
from forescale.models.mixers.latent import Latent
from forescale.models.mixers.lstm import LSTM
from forescale.models.mixers.mingru import MinGRU
from forescale.models.mixers.window import Window
from forescale.models.part import Mixer, registry

MIXERS: dict[str, type[Mixer]] = registry(Attention, GatedDeltaNet, Latent, LSTM, MinGRU, Window)
