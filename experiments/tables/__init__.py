"""Files and DataFrames in, DataFrames of series out, and forecasts back to tables. It knows no model.

A series is a DataFrame: a row for each time step, a column for each variable. Its index is a DatetimeIndex, a
RangeIndex if there are no times, or numbers. `attrs["name"]` is what the user calls it.
"""

from experiments.tables.reading import read_series as read_series
from experiments.tables.series import from_frame as from_frame
from experiments.tables.series import told as told
from experiments.tables.table import DataError as DataError
from experiments.tables.times import common_times as common_times
from experiments.tables.times import following as following
from experiments.tables.writing import forecast_frame as forecast_frame
from experiments.tables.writing import write as write
