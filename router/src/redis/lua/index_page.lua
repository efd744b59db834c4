-- Clients of an index in order, group by group. KEYS[1]: groups and clients in order.
-- ARGV: a client (begin after it; may be empty), how many of each group. Answers group and client in turn.
local answer = {}
local from = '-'
while true do
  local first = redis.call('ZRANGEBYLEX', KEYS[1], from, '+', 'LIMIT', 0, 1)[1]
  if not first then
    return answer
  end
  local group = string.match(first, '^(%Z*)%z')
  local low, high = '(' .. group .. '\0' .. ARGV[1], '(' .. group .. '\1'
  for _, member in ipairs(redis.call('ZRANGEBYLEX', KEYS[1], low, high, 'LIMIT', 0, ARGV[2])) do
    table.insert(answer, group)
    table.insert(answer, string.sub(member, #group + 2))
  end
  from = '[' .. group .. '\1'
end
