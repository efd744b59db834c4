-- The receipt of a push. ARGV: 3 message id. Answers it, or nothing.
return receipt(load(), ARGV[3], now_ms()) or {}
