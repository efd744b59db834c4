-- Takes an entry of a shared subscription out, or claims it for whoever moves it to another inbox.
-- ARGV: 3 position, 4 'take' or the claim, 5 how long the claim holds, in ms.
-- Answers {what ended, 1 if nothing waits any more and the client is listed, 'gone' or 'taken' or 'claimed'}.
local n, now, ended = load(), now_ms(), {}
local function answer(word)
  if #ended > 0 then save(n) end
  return { ended, n.c == 0 and n.w or 0, word }
end
local e = n.c > 0 and entry(ARGV[3])
if not e or e.origin ~= 2 then return answer('gone') end
-- [MQTT-4.8.2-5]: a QoS 2 delivery that has begun is nobody else's.
if e.qos == 2 and (up_to(e.position, n.st) or is_received(e)) then
  finish(n, e, 's', '', now, ended)
  return answer('gone')
end
local field = 'claim:' .. e.position
local claim = call('HGET', META, field)
if claim then
  local owner, until_ms = string.match(claim, '^(%S+) (%d+)$')
  if owner ~= ARGV[4] and tonumber(until_ms) > now then return answer('gone') end
end
if ARGV[4] == 'take' then
  finish(n, e, 's', '', now, ended)
  return answer('taken')
end
call('HSET', META, field, ARGV[4] .. ' ' .. int(now + tonumber(ARGV[5])))
return answer('claimed')
