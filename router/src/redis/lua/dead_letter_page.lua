-- A page of dead letters, oldest first. KEYS: letters by id, their order, letters by message. ARGV: the message to go on
-- after the newest letter of (empty: from the beginning), how many. The page goes on to the newest letter of the message
-- that it ends with. Answers ids and records, one after the other.
local function newest_of(message)
  local found = redis.call('ZREVRANGEBYLEX', KEYS[3], '(' .. message .. '!', '[' .. message .. ' ', 'LIMIT', 0, 1)
  return found[1] and string.sub(found[1], #message + 2)
end
local from = '-'
local last = ARGV[1] ~= '' and newest_of(ARGV[1])
if last then
  from = '(' .. last .. ' ' .. ARGV[1]
end
local limit = tonumber(ARGV[2])
local answer = {}
while true do
  local chunk = redis.call('ZRANGEBYLEX', KEYS[2], from, '+', 'LIMIT', 0, 100)
  for _, member in ipairs(chunk) do
    local space = string.find(member, ' ', 1, true)
    local letter = string.sub(member, 1, space - 1)
    answer[#answer + 1] = letter
    answer[#answer + 1] = redis.call('HGET', KEYS[1], letter) or ''
    if #answer / 2 >= limit and newest_of(string.sub(member, space + 1)) == letter then
      return answer
    end
  end
  if #chunk == 0 then
    return answer
  end
  from = '(' .. chunk[#chunk]
end
