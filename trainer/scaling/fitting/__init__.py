"""Pure mathematics: scaling laws, certified fits, intervals, backtests."""
