-- KEYS[2]: session. ARGV[2]: record.
redis.call('SET', KEYS[2], ARGV[2])
owned()
return 1
