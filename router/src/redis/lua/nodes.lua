-- The end of every script about nodes. KEYS[3]: records of nodes. Answers whether the node was known, how many milliseconds
-- ago the registry was made, the longest lease of a node; then of each node id, milliseconds left, length of the lease, record.
local born = redis.call('HGET', KEYS[2], 'born')
if not born then
  born = string.format('%.0f', now)
  redis.call('HSET', KEYS[2], 'born', born)
end
local answer = { known, now - tonumber(born), 0 }
for name, lease in pairs(leases) do
  if string.sub(name, 1, 1) == 'n' and valid(name) then
    local record = redis.call('HGET', KEYS[3], lease.holder)
    if record then
      answer[3] = math.max(answer[3], lease.length)
      table.insert(answer, { lease.holder, lease.ends - now, lease.length, record })
    end
  end
end
return answer
