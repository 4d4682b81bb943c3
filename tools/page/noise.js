// The noise of sample.py's images, number by number: numpy.random.default_rng([seed, image, draw]).standard_normal in
// float32. That is SeedSequence (O'Neill 2015, "Developing a seed_seq alternative"), PCG64 (O'Neill 2014, "PCG",
// XSL-RR 128/64) and the ziggurat of 256 layers (Marsaglia & Tsang 2000). Only the rare numbers of the tail, beyond
// 3.65, can differ from numpy's, by the last bit, as the logarithm there is the browser's.

const f = (x) => Math.exp(-x * x / 2)
const R = 3.6541528853610088, V = 0.004928673233974655      // where the tail begins; the area of each layer

// x[i]: the width of layer i, of height f(x[i - 1]) - f(x[i]) and area V. A number r / 2^23 x[i] of layer i lies under
// the curve for certain where r < inside[i].
const x = new Float64Array(256)
x[255] = R
for (let i = 254; i > 0; i--) x[i] = Math.sqrt(-2 * Math.log(V / x[i + 1] + f(x[i + 1])))
const height = Float32Array.from(x, (x, i) => i ? f(x) : 1)
x[0] = V / f(R)                                             // the base layer, as wide as if it had no tail
const inside = Uint32Array.from(x, (width, i) => i === 1 ? 0 : Math.round((i ? x[i - 1] : R) / width * 2 ** 23))
const scale = Float32Array.from(x, (x) => x / 2 ** 23)

function seedSequence(numbers) {                            // -> four uint64, as BigInt
  const words = numbers.flatMap((n) => n < 2 ** 32 ? [n] : [n % 2 ** 32, Math.floor(n / 2 ** 32)])
  const fold = (word) => (word ^ word >>> 16) >>> 0
  const hasher = (constant, factor) => (word) => {
    word ^= constant
    constant = Math.imul(constant, factor)
    return fold(Math.imul(word, constant))
  }
  const mix = (a, b) => fold(Math.imul(0xca01f9dd, a) - Math.imul(0x4973f715, b))
  let hash = hasher(0x43b0d7e5, 0x931e8875)
  const pool = [0, 1, 2, 3].map((i) => hash(words[i] ?? 0))
  for (let i = 0; i < 4; i++) for (let j = 0; j < 4; j++) if (i !== j) pool[j] = mix(pool[j], hash(pool[i]))
  for (const word of words.slice(4)) for (let j = 0; j < 4; j++) pool[j] = mix(pool[j], hash(word))
  hash = hasher(0x8b51f9dd, 0x58f38ded)
  const state = Array.from({length: 8}, (_, i) => BigInt(hash(pool[i % 4])))
  return [0, 2, 4, 6].map((i) => state[i] | state[i + 1] << 32n)
}

function pcg64(numbers) {                                   // -> a function that draws uint32
  const wrap = (n) => BigInt.asUintN(128, n)
  const [high, low, incrementHigh, incrementLow] = seedSequence(numbers)
  const increment = wrap((incrementHigh << 64n | incrementLow) << 1n | 1n)
  const step = (state) => wrap(state * 0x2360ed051fc65da44385df649fccf645n + increment)
  let state = step(wrap(increment + (high << 64n | low))), upper = null
  return () => {
    if (upper !== null) {                                   // 64 bits a step, the lower half first
      const half = upper
      upper = null
      return half
    }
    state = step(state)
    const word = BigInt.asUintN(64, state >> 64n ^ state), turn = state >> 122n
    const out = BigInt.asUintN(64, word >> turn | word << 64n - turn)
    upper = Number(out >> 32n)
    return Number(out & 0xffffffffn)
  }
}

const {fround} = Math

function normal(uint32) {
  const uniform = () => (uint32() >>> 8) / 2 ** 24
  for (;;) {
    const bits = uint32(), i = bits & 255, r = bits >>> 9
    const number = (bits & 256 ? -1 : 1) * fround(r * scale[i])
    if (r < inside[i]) return number
    if (i) {
      const y = fround(fround(fround(height[i - 1] - height[i]) * uniform()) + height[i])
      if (y < f(number)) return number
    } else {
      for (;;) {                                            // the tail
        const beyond = fround(-fround(Math.log1p(-uniform())) * fround(1 / R)), y = -Math.log1p(-uniform())
        if (2 * y > beyond * beyond) return (r & 256 ? -1 : 1) * fround(fround(R) + beyond)
      }
    }
  }
}

// Noise of one image: Float32Array [3 * size * size]. walk, 0 .. 1: how far to go to that of seed + 1, along the arc on
// which all is unit noise.
export function imageNoise(seed, image, size, draw = 0, walk = 0) {
  const unit = (seed) => {
    const uint32 = pcg64([seed, image, draw])
    return Float32Array.from({length: 3 * size * size}, () => normal(uint32))
  }
  if (!walk) return unit(seed)
  const a = Math.cos(walk * Math.PI / 2), b = Math.sin(walk * Math.PI / 2), to = unit(seed + 1)
  return unit(seed).map((z, i) => a * z + b * to[i])
}
