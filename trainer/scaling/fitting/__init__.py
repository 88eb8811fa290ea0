"""Pure mathematics: the laws, certified fits, intervals, backtests."""
