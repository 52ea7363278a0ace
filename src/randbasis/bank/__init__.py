"""STORE → ONE BATCH: many adapters over one base model as rows of tables, math (21)-(24).

:class:`AdapterBank` stands on a plain model, without PEFT. Adapters that differ in their coefficients alone, a
*profile*, are rows of one table; what a batch adds in each layer is planned once a batch. docs/serving.md has the types
and who sets each field.
"""

from randbasis.bank.bank import AdapterBank
from randbasis.bank.plan import BatchPlan
from randbasis.bank.resident import Lease, Resident

__all__ = ["AdapterBank", "BatchPlan", "Lease", "Resident"]
