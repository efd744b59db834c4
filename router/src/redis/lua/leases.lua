-- Before every script about leases. KEYS[1]: who has what ('n'node, 's'shard): holder, end and length of the lease;
-- KEYS[2]: the registry's own times.
--
-- The registry beats whenever it is asked. Where it has not for longer than half a lease, the store was away (or nobody
-- was there), and whoever had that lease then could not renew it: it runs a whole length from now on.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local leases = {}
local read = redis.call('HGETALL', KEYS[1])
for i = 1, #read, 2 do
  local ends, length, holder = string.match(read[i + 1], '^(%d+) (%d+) (.*)$')
  leases[read[i]] = { ends = tonumber(ends), length = tonumber(length), holder = holder }
end

local function keep(name)
  local lease = leases[name]
  redis.call('HSET', KEYS[1], name, string.format('%.0f %.0f ', lease.ends, lease.length) .. lease.holder)
end

local function forget(name)
  redis.call('HDEL', KEYS[1], name)
  leases[name] = nil
end

local function grant(name, holder, length)
  leases[name] = { ends = now + length, length = length, holder = holder }
  keep(name)
end

local function valid(name)
  return leases[name] and leases[name].ends > now
end

local beat = tonumber(redis.call('HGET', KEYS[2], 'beat'))
for name, lease in pairs(leases) do
  if beat and lease.ends > beat and now - beat > lease.length / 2 then
    lease.ends = math.max(lease.ends, now + lease.length)
    keep(name)
  elseif now - lease.ends > lease.length * 60 then
    forget(name)
    if KEYS[3] then
      redis.call('HDEL', KEYS[3], lease.holder)
    end
  end
end
redis.call('HSET', KEYS[2], 'beat', string.format('%.0f', now))
