-- The groups of an index. KEYS[1]: groups and clients in order.
local groups = {}
local from = '-'
while true do
  local first = redis.call('ZRANGEBYLEX', KEYS[1], from, '+', 'LIMIT', 0, 1)[1]
  if not first then
    return groups
  end
  local group = string.match(first, '^(%Z*)%z')
  table.insert(groups, group)
  from = '[' .. group .. '\1'
end
