-- Jobs of some states by the time of each. ARGV: states, time and id of the one that the list goes on after (empty: from the
-- beginning), from when on, before when, how many. Answers id and time of each, state by state.
local limit, found = tonumber(ARGV[6]), {}

-- Whether `a` comes after `b`, byte by byte: strings compare as the locale says.
local function is_after(a, b)
  for i = 1, math.min(#a, #b) do
    local one, other = string.byte(a, i), string.byte(b, i)
    if one ~= other then return one > other end
  end
  return #a > #b
end

-- The rank of the first one behind (ARGV[2], ARGV[3]).
local function rank_after(key)
  local low = call('ZCOUNT', key, '-inf', '(' .. ARGV[2])
  local high = call('ZCOUNT', key, '-inf', ARGV[2])
  while low < high do
    local middle = math.floor((low + high) / 2)
    if is_after(call('ZRANGE', key, middle, middle)[1], ARGV[3]) then high = middle else low = middle + 1 end
  end
  return low
end

for state in string.gmatch(ARGV[1], '.') do
  local key = IN .. state
  local from = call('ZCOUNT', key, '-inf', '(' .. ARGV[4])
  if ARGV[2] ~= '' then from = math.max(from, rank_after(key)) end
  local count = math.min(limit, call('ZCOUNT', key, '-inf', '(' .. ARGV[5]) - from)
  if count > 0 then
    for _, value in ipairs(call('ZRANGE', key, from, from + count - 1, 'WITHSCORES')) do found[#found + 1] = value end
  end
end
return found
