-- ARGV: node. What shards it has are free, too.
local known = 0
forget('n' .. ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
for name, lease in pairs(leases) do
  if lease.holder == ARGV[1] then
    forget(name)
  end
end
