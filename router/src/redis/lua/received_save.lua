-- KEYS[2]: received packet identifiers. ARGV: epoch, packet identifier, record.
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
return 1
