// Picks voxels of an eroded organ. The organ is packed to bits, 32 voxels of a row in a word, so that an erosion is a
// few shifts and ANDs for 32 voxels, and counting is a sum of set bits. Integers throughout, but for draw * count: the
// result depends on nothing but the arguments.
//
// Four launches on one stream, each a thread per word but the last: pack, erode along x and y, erode along z and count,
// pick. The organ's bytes are read once; what comes after moves an eighth of them.

constexpr int THREADS = 256;  // the launcher's block; also the words of a chunk, whose voxels are counted together
constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;

// The patches' shape in words.
struct Grid {
    long long num_samples, nz, ny, nx, words_per_row, words_per_sample, chunks_per_sample;
};

__device__ Grid grid_of(long long num_samples, long long nz, long long ny, long long nx) {
    Grid grid = {num_samples, nz, ny, nx, (nx + 31) / 32, 0, 0};
    grid.words_per_sample = nz * ny * grid.words_per_row;
    grid.chunks_per_sample = (grid.words_per_sample + THREADS - 1) / THREADS;
    return grid;
}

// The bits of a row's last word that lie behind the patch.
__device__ unsigned beyond(const Grid& grid, long long w) {
    return w == grid.words_per_row - 1 && grid.nx % 32 != 0 ? ALL << (grid.nx % 32) : 0;
}

// The margin of a sample along an axis: its own, or that of all samples; never more than reaches across the patch.
__device__ long long margin_of(const long long* own, long long sample, int axis, long long all, long long length) {
    const long long margin = own != nullptr ? own[3 * sample + axis] : all;
    return margin < length ? margin : length;
}

// bits: [sample][z][y][word], bit i of word w for x = 32 w + i; 0 behind the patch. A warp makes a word.
extern "C" __global__ void pack(unsigned* bits, const unsigned char* organ, long long num_samples, long long nz,
                                long long ny, long long nx) {
    const Grid grid = grid_of(num_samples, nz, ny, nx);
    const long long num_words = num_samples * grid.words_per_sample;
    const int lane = threadIdx.x % WARP, warps = THREADS / WARP;
    for (long long first = (long long)blockIdx.x * warps; first < num_words; first += (long long)gridDim.x * warps) {
        const long long word = first + threadIdx.x / WARP;
        const long long row = word / grid.words_per_row, x = (word - row * grid.words_per_row) * 32 + lane;
        const unsigned found = __ballot_sync(ALL, word < num_words && x < nx && organ[row * nx + x] != 0);
        if (lane == 0 && word < num_words) bits[word] = found;
    }
}

// The AND of a word over its neighbours along y; what lies outside the patch is organ.
__device__ unsigned eroded_along_y(const unsigned* slice, const Grid& grid, long long y, long long w,
                                   long long margin) {
    if (w < 0 || w >= grid.words_per_row) return ALL;
    const long long low = y > margin ? y - margin : 0, high = y + margin < grid.ny ? y + margin : grid.ny - 1;
    unsigned result = ALL;
    for (long long row = low; row <= high; ++row) result &= slice[row * grid.words_per_row + w];
    return result | beyond(grid, w);
}

// rows: the organ eroded along y and x, as bits; what lies behind the patch is of no meaning.
extern "C" __global__ void erode_xy(unsigned* rows, const unsigned* bits, const long long* own_margins,
                                    long long margin_z, long long margin_y, long long margin_x, long long num_samples,
                                    long long nz, long long ny, long long nx) {
    const Grid grid = grid_of(num_samples, nz, ny, nx);
    const long long num_words = num_samples * grid.words_per_sample;
    const long long step = (long long)gridDim.x * THREADS;
    for (long long word = blockIdx.x * (long long)THREADS + threadIdx.x; word < num_words; word += step) {
        const long long row = word / grid.words_per_row, w = word - row * grid.words_per_row;
        const long long slice_number = row / ny, y = row - slice_number * ny, sample = slice_number / nz;
        const unsigned* const slice = bits + slice_number * ny * grid.words_per_row;
        const long long around_y = margin_of(own_margins, sample, 1, margin_y, ny);
        const long long around_x = margin_of(own_margins, sample, 2, margin_x, nx);
        const unsigned here = eroded_along_y(slice, grid, y, w, around_y);
        unsigned result = here;
        if ((here & ~beyond(grid, w)) != 0) {  // most words of a patch hold no organ
            unsigned before = here, after = here;
            for (long long k = 0; 32 * k < around_x; ++k) {  // words to both sides, further and further away
                const unsigned further_before = eroded_along_y(slice, grid, y, w - k - 1, around_y);
                const unsigned further_after = eroded_along_y(slice, grid, y, w + k + 1, around_y);
                const int shifts = around_x - 32 * k < 32 ? (int)(around_x - 32 * k) : 32;
                for (int s = 1; s < shifts; ++s) {
                    result &= (before << s) | (further_before >> (32 - s));
                    result &= (after >> s) | (further_after << (32 - s));
                }
                const int s = shifts;  // the last one may be a whole word
                result &= s == 32 ? further_before : (before << s) | (further_before >> (32 - s));
                result &= s == 32 ? further_after : (after >> s) | (further_after << (32 - s));
                before = further_before;
                after = further_after;
            }
        }
        rows[word] = result;
    }
}

// eroded: the rows eroded along z too, 0 behind the patch. counts: [0: eroded, 1: organ][sample][chunk]. A block makes
// a chunk.
extern "C" __global__ void erode_z(unsigned* eroded, int* counts, const unsigned* rows, const unsigned* bits,
                                   const long long* own_margins, long long margin_z, long long margin_y,
                                   long long margin_x, long long num_samples, long long nz, long long ny,
                                   long long nx) {
    __shared__ int count[2];
    const Grid grid = grid_of(num_samples, nz, ny, nx);
    const long long num_chunks = num_samples * grid.chunks_per_sample, words_per_slice = ny * grid.words_per_row;
    for (long long chunk = blockIdx.x; chunk < num_chunks; chunk += gridDim.x) {
        const long long sample = chunk / grid.chunks_per_sample;
        const long long word = (chunk - sample * grid.chunks_per_sample) * THREADS + threadIdx.x;
        const long long start = sample * grid.words_per_sample;
        if (threadIdx.x < 2) count[threadIdx.x] = 0;
        __syncthreads();
        if (word < grid.words_per_sample) {
            const long long around_z = margin_of(own_margins, sample, 0, margin_z, nz);
            const long long z = word / words_per_slice, in_slice = word - z * words_per_slice;
            const long long low = z > around_z ? z - around_z : 0, high = z + around_z < nz ? z + around_z : nz - 1;
            unsigned result = ~beyond(grid, in_slice % grid.words_per_row);
            for (long long slice = low; slice <= high && result != 0; ++slice) {
                result &= rows[start + slice * words_per_slice + in_slice];
            }
            eroded[start + word] = result;
            const unsigned organ = bits[start + word];
            if (result != 0) atomicAdd(&count[0], __popc(result));
            if (organ != 0) atomicAdd(&count[1], __popc(organ));
        }
        __syncthreads();
        if (threadIdx.x < 2) counts[threadIdx.x * num_chunks + chunk] = count[threadIdx.x];
        __syncthreads();  // before the next chunk starts at 0
    }
}

// The sum of a value over the block's threads, for all of them. place: shared, [THREADS].
__device__ long long block_sum(long long value, long long* place) {
    place[threadIdx.x] = value;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) place[threadIdx.x] += place[threadIdx.x + half];
        __syncthreads();
    }
    const long long sum = place[0];
    __syncthreads();
    return sum;
}

// Things are numbered thread by thread, each holding ``value`` of them: finds the thread that holds ``number``, which
// becomes the number among its own. -1 where the block holds fewer; their count is then taken off the number. For all
// threads of the block alike. place: shared, [THREADS]; found: shared.
__device__ int thread_that_holds(long long value, long long& number, long long* place, int* found) {
    place[threadIdx.x] = value;
    __syncthreads();
    for (int step = 1; step < THREADS; step *= 2) {  // place: of all threads up to this one
        const long long earlier = threadIdx.x >= step ? place[threadIdx.x - step] : 0;
        __syncthreads();
        place[threadIdx.x] += earlier;
        __syncthreads();
    }
    const long long all = place[THREADS - 1];
    if (threadIdx.x == 0) *found = -1;
    __syncthreads();
    if (number < place[threadIdx.x] && number >= place[threadIdx.x] - value) *found = threadIdx.x;
    __syncthreads();
    const int thread = *found;
    number -= thread < 0 ? all : thread == 0 ? 0 : place[thread - 1];
    __syncthreads();
    return thread;
}

// centers: [sample][draw][z y x]. A block takes a draw.
extern "C" __global__ void pick(long long* centers, const unsigned* eroded, const unsigned* bits, const int* counts,
                                const double* draws, long long draws_per_sample, long long num_samples, long long nz,
                                long long ny, long long nx) {
    __shared__ long long place[THREADS];
    __shared__ int found;
    const Grid grid = grid_of(num_samples, nz, ny, nx);
    for (long long draw = blockIdx.x; draw < num_samples * draws_per_sample; draw += gridDim.x) {
        const long long sample = draw / draws_per_sample;
        const int* sample_counts = counts + sample * grid.chunks_per_sample;
        const unsigned* words = eroded + sample * grid.words_per_sample;
        long long total = 0;
        for (int source = 0; source < 2 && total == 0; ++source) {  // the eroded organ, else the organ itself
            if (source == 1) {
                sample_counts += num_samples * grid.chunks_per_sample;
                words = bits + sample * grid.words_per_sample;
            }
            long long mine = 0;
            for (long long c = threadIdx.x; c < grid.chunks_per_sample; c += THREADS) mine += sample_counts[c];
            total = block_sum(mine, place);
        }
        if (total == 0) {
            if (threadIdx.x < 3) centers[3 * draw + threadIdx.x] = -1;
            continue;
        }
        const double position = draws[draw] * (double)total;
        long long number = !(position >= 0.0) ? 0 : position < (double)total ? (long long)position : total - 1;
        long long chunk = -1;
        for (long long first = 0; chunk < 0; first += THREADS) {  // ends: fewer than all voxels are passed over
            const long long c = first + threadIdx.x;
            const long long value = c < grid.chunks_per_sample ? sample_counts[c] : 0;
            const int thread = thread_that_holds(value, number, place, &found);
            if (thread >= 0) chunk = first + thread;
        }
        const long long mine = chunk * THREADS + threadIdx.x;
        const unsigned my_word = mine < grid.words_per_sample ? words[mine] : 0;
        const int thread = thread_that_holds(__popc(my_word), number, place, &found);
        if (threadIdx.x == thread) {
            unsigned left = my_word;
            for (long long k = 0; k < number; ++k) left &= left - 1;  // without the lowest one
            const long long row = mine / grid.words_per_row, w = mine - row * grid.words_per_row;
            centers[3 * draw] = row / ny;
            centers[3 * draw + 1] = row % ny;
            centers[3 * draw + 2] = 32 * w + __ffs((int)left) - 1;
        }
    }
}
