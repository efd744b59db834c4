-- KEYS[2]: session; KEYS[3]: received packet identifiers.
redis.call('DEL', KEYS[2], KEYS[3])
owned()
return 1
