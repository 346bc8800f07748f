"""The paper's tables, run: a model for each row and seed, beside what is published.

May import everything but `cli`.
"""

from rlr_fast.paper.runs import TableResult, configure, run_table
from rlr_fast.paper.tables import TABLES, Row, Table

__all__ = ["TABLES", "Row", "Table", "TableResult", "configure", "run_table"]
