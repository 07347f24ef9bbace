from .converting import convert as convert
from .converting import save_as as save_as
from .native import save as save
from .opening import open_checkpoint as open_checkpoint
