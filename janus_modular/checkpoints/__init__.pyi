from .assembly import ModelAssembly as ModelAssembly
from .assembly import Provenance as Provenance
from .converting import convert as convert
from .converting import save_as as save_as
from .native import save as save
from .opening import LazyCheckpoint as LazyCheckpoint
from .opening import open_lazily as open_lazily
